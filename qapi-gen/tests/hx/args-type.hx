    {
        .name       = "add_fd",
        .args_type  = "letter:x,colon,type:,flag:-,flag2:-1,double:s,double:i,,"
                      "extra:s??,screen:S,format:/,b ad:s,open:O,open2:O,:s,end:s,",
        .mhandler.cmd_new = qmp_marshal_input_add_fd,
    },
