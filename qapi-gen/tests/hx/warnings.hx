HXCOMM A comment, which is in no output.

SQMP
                        A Preamble
                        ----------

The arrows:

-> from the client
<- to the client

EQMP

    {
        .name       = "quit",
        .args_type  = "",
        .mhandler.cmd_new = qmp_marshal_input_quit,
    },

SQMP
@quit
-----

Leave.

HXCOMM not part of the document
-> { "execute": "quit" }
<- { "return": {} }

And some mistakes:

-> { "execute": "quit", "arguments": { "now": true } }
<- { "return": {}
-> { "execute": "exit" }

EQMP
{
        .name       = "add_fd",
        .args_type  = "name:F,"
                      "size:o?",
        .params     = "name [size]",
        .help       = "add \"it\"",
        .user_print = monitor_user_noop,
        .mhandler.cmd_new =
            qmp_marshal_input_add_fd,
},
#if defined(CONFIG_MODE)
    { .name = "set-mode", .args_type = "mode:s,force:-f,speed:T?,target:q?",
      .mhandler.cmd_new = qmp_marshal_input_set_mode }
#else
    {
        .name       = "unknown-here",
        .args_type  = "a:s",
        .mhandler.cmd_new = qmp_marshal_input_unknown_here,
    },
#endif
    /* C comments are allowed */
    {
        .name       = "open-it",
        .args_type  = "options:O",
        .mhandler.cmd_new = qmp_marshal_input_open_it,
    },
    {
        .name       = "raw-it",
        .args_type  = "keys:q,more:q?",
        .mhandler.cmd_new = do_raw_it,
    },
