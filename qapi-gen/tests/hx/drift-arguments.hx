    {
        .name       = "quit",
        .args_type  = "force:-f",
        .mhandler.cmd_new = qmp_marshal_input_quit,
    },
    {
        .name       = "add_fd",
        .args_type  = "nam:s,size:o?",
        .mhandler.cmd_new = qmp_marshal_input_add_fd,
    },
    {
        .name       = "set-mode",
        .args_type  = "speed:T?,mode:s,force:-f",
        .mhandler.cmd_new = qmp_marshal_input_set_mode,
    },
    {
        .name       = "open-it",
        .args_type  = "mode:s",
        .mhandler.cmd_new = qmp_marshal_input_open_it,
    },
    {
        .name       = "raw-it",
        .args_type  = "keys:O",
        .mhandler.cmd_new = do_raw_it,
    },
