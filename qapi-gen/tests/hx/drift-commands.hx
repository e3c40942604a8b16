    {
        .name       = "quitt",
        .args_type  = "",
        .mhandler.cmd_new = qmp_marshal_input_quitt,
    },
    {
        .name       = "add_fd",
        .args_type  = "name:s,size:o?",
        .mhandler.cmd_new = qmp_marshal_input_add_fd,
    },
