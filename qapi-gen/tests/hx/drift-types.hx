    {
        .name       = "quit",
        .args_type  = "",
        .mhandler.cmd_new = qmp_marshal_input_exit,
    },
    {
        .name       = "add_fd",
        .args_type  = "name:i,size:s?",
        .mhandler.cmd_new = qmp_marshal_input_add_fd,
    },
    {
        .name       = "set-mode",
        .args_type  = "mode:b,force:i?,speed:l?,target:F?",
        .mhandler.cmd_new = qmp_marshal_input_set_mode,
    },
    {
        .name       = "open-it",
        .args_type  = "options:O",
        .mhandler.cmd_new = qmp_marshal_input_open_it,
    },
    {
        .name       = "raw-it",
        .args_type  = "keys:q,more:T?",
        .mhandler.cmd_new = do_raw_it,
    },
