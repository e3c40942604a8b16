SQMP
quit
----

The end is missing.
