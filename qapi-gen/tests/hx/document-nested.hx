SQMP
quit
----

SQMP
other
-----

EQMP
