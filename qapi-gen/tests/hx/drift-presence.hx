    {
        .name       = "quit",
        .args_type  = "",
        .mhandler.cmd_new = qmp_marshal_input_quit,
    },
    {
        .name       = "add_fd",
        .args_type  = "name:s?,size:o",
        .mhandler.cmd_new = qmp_marshal_input_add_fd,
    },
    {
        .name       = "set-mode",
        .args_type  = "mode:s,force:b,speed:T?,target:q?",
        .mhandler.cmd_new = qmp_marshal_input_set_mode,
    },
    {
        .name       = "open-it",
        .args_type  = "options:O",
        .mhandler.cmd_new = qmp_marshal_input_open_it,
    },
    {
        .name       = "raw-it",
        .args_type  = "options:O",
        .mhandler.cmd_new = do_raw_it,
    },
