    {
        .args_type  = "",
        .mhandler.cmd_new = qmp_marshal_input_quit,
    },
    {
        .name       = "quit",
        .arg_type   = "",
    },
    {
        .name       = monitor_name,
        .args_type  = 12,
    },
    {
        .name       = "add_fd",
        .name       = "add-fd",
        .args_type  = "name:s,size:o?",
        .mhandler.cmd_new = qmp_marshal_input_add_fd,
    },
