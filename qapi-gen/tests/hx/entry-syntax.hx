    {
        .name       = "a"
        .args_type  = "",
    },
    {
        .name       "b",
    },
    {
        name        = "c",
    },
    {
        .name       = ,
    },
    {
        .name       = "e",
        .args_type  = "",
