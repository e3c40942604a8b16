#endif
#else
#if defined(A)
#pragma once
#ifdef B
    {
        .name       = "quit",
        .args_type  = "",
        .mhandler.cmd_new = qmp_marshal_input_quit,
    },
#endif
