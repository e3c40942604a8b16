HXCOMM The command table: one entry for each command of qapi-schema.json, and a
HXCOMM document for it. Between SQMP and EQMP stands the document; its examples
HXCOMM are run by the tests.

SQMP
                        Commands of qblockd
                        -------------------

A client connects, reads the greeting, sends qmp_capabilities, and then any of
the commands below. Each is one JSON object, and so is each answer; the examples
are broken into lines for the reader only.

In the examples,

-> is what the client sends
<- is what the daemon answers

1. Sessions
===========

EQMP

    {
        .name       = "qmp_capabilities",
        .args_type  = "enable:q?",
        .params     = "[enable]",
        .help       = "begin the session",
        .mhandler.cmd_new = qmp_marshal_input_qmp_capabilities,
    },

SQMP
qmp_capabilities
----------------

Begin the session. It must be the first command, and is refused later.

Arguments:

- "enable": capabilities to switch on, of those in the greeting
  (json-array, optional)

Example:

-> { "execute": "qmp_capabilities" }
<- { "return": {} }

EQMP

    {
        .name       = "query-version",
        .args_type  = "",
        .help       = "show the version",
        .mhandler.cmd_new = qmp_marshal_input_query_version,
    },

SQMP
query-version
-------------

Tell the version of the protocol and of the program. The greeting says the same.

Return a json-object with:

- "qemu": the version of QEMU whose protocol is spoken (json-object)
  - "major": first number (json-int)
  - "minor": second number (json-int)
  - "micro": third number (json-int)
- "package": name and version of the program (json-string)

Example:

-> { "execute": "query-version" }
<- { "return": { "qemu": { "major": 10, "minor": 0, "micro": 2 },
                 "package": "qblockd-0.1.0" } }

EQMP

    {
        .name       = "query-commands",
        .args_type  = "",
        .help       = "list the commands",
        .mhandler.cmd_new = qmp_marshal_input_query_commands,
    },

SQMP
query-commands
--------------

List the commands that this session can run.

Return a json-array of json-objects, each with:

- "name": the command (json-string)

Example:

-> { "execute": "query-commands" }
<- { "return": [ { "name": "query-block" }, { "name": "query-version" } ] }

EQMP

    {
        .name       = "query-qmp-schema",
        .args_type  = "",
        .help       = "show the schema of the protocol",
        .mhandler.cmd_new = qmp_marshal_input_query_qmp_schema,
    },

SQMP
query-qmp-schema
----------------

Tell which commands and events there are, and the types of their arguments and
results. A client that wants to know whether a feature is there looks here.

Return a json-array of json-objects, each with at least:

- "name": name of the entity (json-string)
- "meta-type": what it is (json-string)

Example:

-> { "execute": "query-qmp-schema" }
<- { "return": [ { "name": "query-status", "meta-type": "command",
                   "arg-type": "0", "ret-type": "1" },
                 { "name": "0", "meta-type": "object", "members": [] } ] }

EQMP

    {
        .name       = "query-status",
        .args_type  = "",
        .help       = "show whether the machine runs",
        .mhandler.cmd_new = qmp_marshal_input_query_status,
    },

SQMP
query-status
------------

Tell whether the guests of drives are served.

Return a json-object with:

- "running": whether they are (json-bool)
- "status": "running", "paused" (by stop), or "io-error" if a request has
  failed whose drive stops the machine then (json-string)

Example:

-> { "execute": "query-status" }
<- { "return": { "running": true, "status": "running" } }

EQMP

    {
        .name       = "stop",
        .args_type  = "",
        .help       = "stop the machine",
        .mhandler.cmd_new = qmp_marshal_input_stop,
    },

SQMP
stop
----

Stop the machine: requests to drives wait from now on. Those under way are
finished and made durable before the answer. Commands and jobs go on.

Arguments: None.

Example:

-> { "execute": "stop" }
<- { "return": {} }

EQMP

    {
        .name       = "cont",
        .args_type  = "",
        .help       = "let the machine go on",
        .mhandler.cmd_new = qmp_marshal_input_cont,
    },

SQMP
cont
----

Let the machine go on. Requests that have stopped it are sent again. If what
has stopped it is still the matter, it stops again.

Arguments: None.

Example:

-> { "execute": "cont" }
<- { "return": {} }

EQMP

    {
        .name       = "quit",
        .args_type  = "",
        .help       = "end the daemon",
        .mhandler.cmd_new = qmp_marshal_input_quit,
    },

SQMP
quit
----

End the daemon. Exports are closed and images are flushed first.

Arguments: None.

Example:

-> { "execute": "quit" }
<- { "return": {} }

2. Drives and nodes
===================

EQMP

    {
        .name       = "query-block",
        .args_type  = "",
        .help       = "list the drives",
        .mhandler.cmd_new = qmp_marshal_input_query_block,
    },

SQMP
query-block
-----------

List the drives. Under "inserted" is the root node of each, with its image and
the image's snapshots.

Return a json-array of json-objects, each with:

- "device": the drive's id (json-string)
- "type": always "unknown" (json-string)
- "removable": whether the medium can be taken out (json-bool)
- "locked": whether the medium is held fast (json-bool)
- "io-status": "ok", or after an error that has stopped the machine "failed" or
  "nospace" (json-string, absent if no error of the drive does that)
- "qdev": the id again, as that of a device (json-string)
- "inserted": the root node, as query-named-block-nodes shows it
  (json-object, absent without a medium)

Example:

-> { "execute": "query-block" }
<- { "return": [ {
        "device": "ide-hd0", "qdev": "ide-hd0", "type": "unknown",
        "removable": false, "locked": false, "io-status": "ok",
        "inserted": {
            "file": "disk.qcow2", "node-name": "#block012",
            "ro": false, "drv": "qcow2", "backing_file_depth": 0,
            "active": true, "encrypted": false, "detect_zeroes": "off",
            "bps": 0, "bps_rd": 0, "bps_wr": 0,
            "iops": 0, "iops_rd": 0, "iops_wr": 0,
            "cache": { "writeback": true, "direct": false,
                       "no-flush": false },
            "write_threshold": 0,
            "image": {
                "filename": "disk.qcow2", "format": "qcow2",
                "virtual-size": 1073741824, "actual-size": 2166784,
                "cluster-size": 65536, "dirty-flag": false,
                "snapshots": [
                    { "id": "1", "name": "monday", "vm-state-size": 0,
                      "date-sec": 1763758800, "date-nsec": 250000000,
                      "vm-clock-sec": 0, "vm-clock-nsec": 0 } ],
                "format-specific": {
                    "type": "qcow2",
                    "data": { "compat": "1.1", "compression-type": "zlib",
                              "lazy-refcounts": false, "refcount-bits": 16,
                              "corrupt": false, "extended-l2": false } }
            } } } ] }

EQMP

    {
        .name       = "query-blockstats",
        .args_type  = "query-nodes:b?",
        .params     = "[query-nodes]",
        .help       = "show what drives have done",
        .mhandler.cmd_new = qmp_marshal_input_query_blockstats,
    },

SQMP
query-blockstats
----------------

Tell what the guests of drives have asked for, and how long it took.

Arguments:

- "query-nodes": tell what all nodes have done instead (json-bool, optional)

Return a json-array of json-objects, each with:

- "device", "qdev": the drive's id (json-string, only of drives)
- "node-name": the root node (json-string, absent without a medium)
- "stats": a json-object; among its members, all of them json-int, are
    - "rd_bytes", "wr_bytes", "unmap_bytes": bytes read, written, discarded
    - "rd_operations", "wr_operations", "unmap_operations", "flush_operations":
      requests that succeeded
    - "rd_total_time_ns", "wr_total_time_ns", "unmap_total_time_ns",
      "flush_total_time_ns": the time that they took, in nanoseconds
    - "wr_highest_offset": the offset behind the highest byte written
    - "failed_rd_operations" and so on: requests whose guest was told of a
      failure
    - "invalid_rd_operations" and so on: requests that made no sense
- "parent": the node below that has the data, in the same form (json-object,
  optional)
- "backing": the image that backs it, in the same form (json-object, optional)

Example:

-> { "execute": "query-blockstats" }
<- { "return": [ {
        "device": "ide-hd0", "qdev": "ide-hd0", "node-name": "#block012",
        "stats": {
            "rd_bytes": 4096, "wr_bytes": 65536,
            "zone_append_bytes": 0, "unmap_bytes": 0,
            "rd_operations": 1, "wr_operations": 1,
            "zone_append_operations": 0,
            "flush_operations": 1, "unmap_operations": 0,
            "rd_total_time_ns": 3465673, "wr_total_time_ns": 313253,
            "zone_append_total_time_ns": 0,
            "flush_total_time_ns": 49653, "unmap_total_time_ns": 0,
            "wr_highest_offset": 65536,
            "rd_merged": 0, "wr_merged": 0,
            "zone_append_merged": 0, "unmap_merged": 0,
            "idle_time_ns": 2953431879,
            "failed_rd_operations": 0, "failed_wr_operations": 0,
            "failed_zone_append_operations": 0,
            "failed_flush_operations": 0, "failed_unmap_operations": 0,
            "invalid_rd_operations": 0, "invalid_wr_operations": 0,
            "invalid_zone_append_operations": 0,
            "invalid_flush_operations": 0, "invalid_unmap_operations": 0,
            "account_invalid": true, "account_failed": true,
            "timed_stats": [ ] } } ] }

EQMP

    {
        .name       = "query-named-block-nodes",
        .args_type  = "flat:b?",
        .params     = "[flat]",
        .help       = "list the nodes",
        .mhandler.cmd_new = qmp_marshal_input_query_named_block_nodes,
    },

SQMP
query-named-block-nodes
-----------------------

List all nodes, also those whose names were made up.

Arguments:

- "flat": leave out "backing-image" of each image (json-bool, optional)

Return a json-array of json-objects; query-block's example shows one under
"inserted".

Example:

-> { "execute": "query-named-block-nodes", "arguments": { "flat": true } }
<- { "return": [ {
        "file": "disk.raw", "node-name": "disk-file",
        "ro": false, "drv": "file", "backing_file_depth": 0,
        "active": true, "encrypted": false, "detect_zeroes": "off",
        "bps": 0, "bps_rd": 0, "bps_wr": 0,
        "iops": 0, "iops_rd": 0, "iops_wr": 0,
        "cache": { "writeback": true, "direct": false, "no-flush": false },
        "write_threshold": 0,
        "image": { "filename": "disk.raw", "format": "file",
                   "virtual-size": 1073741824, "actual-size": 4096,
                   "dirty-flag": false,
                   "format-specific": { "type": "file", "data": {} } } } ] }

EQMP

    {
        .name       = "x-debug-query-block-graph",
        .args_type  = "",
        .help       = "show who uses which node",
        .mhandler.cmd_new = qmp_marshal_input_x_debug_query_block_graph,
    },

SQMP
x-debug-query-block-graph
-------------------------

Show the block graph: drives, exports, jobs and nodes, and who uses whom. It is
for people who look for faults.

Return a json-object with:

- "nodes": json-array of points, each with
  - "id": its number in this answer (json-int)
  - "type": "block-backend" for drives and exports, "block-job" or
    "block-driver" (json-string)
  - "name": the name of a node, the id of a drive or job, or "" (json-string)
- "edges": json-array of lines, each with
  - "parent": the number of the one that uses (json-int)
  - "child": the number of the one that is used (json-int)
  - "name": the role that it has (json-string)
  - "perm": what is done to it: "consistent-read", "write",
    "write-unchanged", "resize" (json-array of json-string)
  - "shared-perm": what others may do to it (json-array of json-string)

Example:

-> { "execute": "x-debug-query-block-graph" }
<- { "return": {
        "nodes": [
            { "id": 2, "type": "block-driver", "name": "disk0" },
            { "id": 3, "type": "block-driver", "name": "#block123" },
            { "id": 1, "type": "block-backend", "name": "" } ],
        "edges": [
            { "parent": 2, "child": 3, "name": "file",
              "perm": [ "resize", "write", "consistent-read" ],
              "shared-perm": [ "write-unchanged", "consistent-read" ] },
            { "parent": 1, "child": 2, "name": "root",
              "perm": [ "write", "consistent-read" ],
              "shared-perm": [ "write-unchanged", "write",
                               "consistent-read" ] } ] } }

EQMP

    {
        .name       = "blockdev-add",
        .args_type  = "options:O",
        .params     = "driver [node-name] [options]",
        .help       = "make a node",
        .mhandler.cmd_new = qmp_marshal_input_blockdev_add,
    },

SQMP
blockdev-add
------------

Make a node, with the nodes below it. If anything fails, none of them is left.

Arguments:

- "driver": "file", "null-co", "qcow2" or "raw" (json-string)
- "node-name": the node's name (json-string, optional)
- all options of the driver; a node below is given by its name, by the id of its
  drive, or by its options

Examples:

-> { "execute": "blockdev-add",
     "arguments": { "driver": "qcow2", "node-name": "disk0",
                    "file": { "driver": "file",
                              "filename": "disk.qcow2" } } }
<- { "return": {} }

A node on top of one that exists:

-> { "execute": "blockdev-add",
     "arguments": { "driver": "raw", "node-name": "window",
                    "offset": 1048576, "file": "disk-file" } }
<- { "return": {} }

A snapshot inside the image of a drive, to be read while the drive is written:

-> { "execute": "blockdev-add",
     "arguments": { "driver": "qcow2", "node-name": "monday0",
                    "x-snapshot": "monday", "file": "ide-hd0" } }
<- { "return": {} }

EQMP

    {
        .name       = "blockdev-reopen",
        .args_type  = "options:q",
        .params     = "options",
        .help       = "give nodes new options",
        .mhandler.cmd_new = qmp_marshal_input_blockdev_reopen,
    },

SQMP
blockdev-reopen
---------------

Give nodes new options while they are in use: all of them, or none if anything
fails. What is left out goes back to its default; what cannot change must be
given as it is.

Arguments:

- "options": json-array of the nodes, each a json-object as for blockdev-add with
  its "node-name" and all of its options. "file" and "backing" may name other
  nodes; "backing" may be null, and must be given where there is one.

Example:

-> { "execute": "blockdev-reopen",
     "arguments": { "options": [
         { "driver": "qcow2", "node-name": "disk0", "read-only": true,
           "file": { "driver": "file", "filename": "disk.qcow2" } } ] } }
<- { "return": {} }

EQMP

    {
        .name       = "change-backing-file",
        .args_type  = "device:s,image-node-name:s,backing-file:s",
        .params     = "device image-node-name backing-file",
        .help       = "change what an image says about its backing file",
        .mhandler.cmd_new = qmp_marshal_input_change_backing_file,
    },

SQMP
change-backing-file
-------------------

Change the name of the backing file in an image's header. What the image shows
does not change until it is opened again.

Arguments:

- "device": the drive, or the node at the top of the chain (json-string)
- "image-node-name": the node of the image (json-string)
- "backing-file": the name to write; "" for none (json-string)

Example:

-> { "execute": "change-backing-file",
     "arguments": { "device": "disk0", "image-node-name": "disk0",
                    "backing-file": "/images/base.raw" } }
<- { "return": {} }

EQMP

    {
        .name       = "blockdev-del",
        .args_type  = "node-name:s",
        .params     = "node-name",
        .help       = "take away a node",
        .mhandler.cmd_new = qmp_marshal_input_blockdev_del,
    },

SQMP
blockdev-del
------------

Take away a node that nobody uses. Its image is flushed and closed.

Arguments:

- "node-name": the node (json-string)

Example:

-> { "execute": "blockdev-del", "arguments": { "node-name": "disk0" } }
<- { "return": {} }

EQMP

    {
        .name       = "blockdev-create",
        .args_type  = "job-id:s,options:q",
        .params     = "job-id options",
        .help       = "make an image",
        .mhandler.cmd_new = qmp_marshal_input_blockdev_create,
    },

SQMP
blockdev-create
---------------

Begin a job that makes a file, or an image in a node. The job stays until
job-dismiss; query-jobs shows whether it has failed.

Arguments:

- "job-id": the job (json-string)
- "options": what to make (json-object), with "driver" and
    - for "file": "filename" (json-string), "size" in bytes (json-int), and
      "preallocation": "off", "falloc" or "full" (json-string, optional)
    - for "qcow2": "file", the node (json-string or json-object), "size", and
      what else the schema lists

Example:

-> { "execute": "blockdev-create",
     "arguments": { "job-id": "job0",
                    "options": { "driver": "file", "filename": "new.raw",
                                 "size": 1073741824 } } }
<- { "return": {} }

EQMP

    {
        .name       = "block_resize",
        .args_type  = "device:B?,node-name:s?,size:o",
        .params     = "[device] [node-name] size",
        .help       = "change the size of an image",
        .mhandler.cmd_new = qmp_marshal_input_block_resize,
    },

SQMP
block_resize
------------

Change the size of an image while it is in use.

Arguments:

- "device": the drive (json-string, optional)
- "node-name": the node (json-string, optional)
- "size": the new size in bytes (json-int)

Exactly one of "device" and "node-name" must be given.

Example:

-> { "execute": "block_resize",
     "arguments": { "device": "ide-hd0", "size": 2147483648 } }
<- { "return": {} }

3. Snapshots
============

EQMP

    {
        .name       = "blockdev-snapshot-sync",
        .args_type  = "device:s?,node-name:s?,snapshot-file:s,snapshot-node-name:s?,format:s?,mode:s?",
        .params     = "[device|node-name] snapshot-file [snapshot-node-name] [format] [mode]",
        .help       = "put a new image on a disk",
        .mhandler.cmd_new = qmp_marshal_input_blockdev_snapshot_sync,
    },

SQMP
blockdev-snapshot-sync
----------------------

Put a new image on a disk. What is written from now on goes there; the disk's
image becomes its backing file and stays as it is. Exports of the disk go on.

Arguments:

- "device": the drive or node (json-string, optional)
- "node-name": the node (json-string, optional); one of the two is needed
- "snapshot-file": file of the new image (json-string)
- "snapshot-node-name": name of its node (json-string, optional; needed with
  "node-name")
- "format": format of the new image (json-string, optional, default "qcow2")
- "mode": "absolute-paths" to make the image, whose former content is gone then,
  or "existing" to open what is there (json-string, optional, default
  "absolute-paths")

Example:

-> { "execute": "blockdev-snapshot-sync",
     "arguments": { "device": "ide-hd0", "snapshot-file": "monday.qcow2" } }
<- { "return": {} }

EQMP

    {
        .name       = "blockdev-snapshot",
        .args_type  = "node:s,overlay:s",
        .params     = "node overlay",
        .help       = "put a node on a disk",
        .mhandler.cmd_new = qmp_marshal_input_blockdev_snapshot,
    },

SQMP
blockdev-snapshot
-----------------

Put a node on a disk, as blockdev-snapshot-sync does with a file. It has no backing
("backing": null when it is added), and nobody uses it.

Arguments:

- "node": the drive or node that it is put on (json-string)
- "overlay": the node (json-string)

Example:

-> { "execute": "blockdev-snapshot",
     "arguments": { "node": "ide-hd0", "overlay": "overlay" } }
<- { "return": {} }

EQMP

    {
        .name       = "blockdev-snapshot-internal-sync",
        .args_type  = "device:B,name:s",
        .params     = "device name",
        .help       = "take a snapshot inside the image",
        .mhandler.cmd_new = qmp_marshal_input_blockdev_snapshot_internal_sync,
    },

SQMP
blockdev-snapshot-internal-sync
-------------------------------

Take a snapshot inside the image. It is on stable storage when the answer comes.

Arguments:

- "device": the drive or node (json-string)
- "name": name of the snapshot, new in the image (json-string)

Example:

-> { "execute": "blockdev-snapshot-internal-sync",
     "arguments": { "device": "ide-hd0", "name": "monday" } }
<- { "return": {} }

EQMP

    {
        .name       = "blockdev-snapshot-delete-internal-sync",
        .args_type  = "device:B,id:s?,name:s?",
        .params     = "device [id] [name]",
        .help       = "delete a snapshot inside the image",
        .mhandler.cmd_new =
            qmp_marshal_input_blockdev_snapshot_delete_internal_sync,
    },

SQMP
blockdev-snapshot-delete-internal-sync
--------------------------------------

Delete a snapshot inside the image. If both "id" and "name" are given, one
snapshot must match both; at least one must be given. A snapshot that a node made
with "x-snapshot" reads cannot be deleted.

Arguments:

- "device": the drive or node (json-string)
- "id": the snapshot's id (json-string, optional)
- "name": the snapshot's name (json-string, optional)

Return a json-object that says what was deleted:

- "id": its id (json-string)
- "name": its name (json-string)
- "vm-state-size": bytes of machine state that it held (json-int)
- "date-sec": when it was taken, seconds since 1970 (json-int)
- "date-nsec": nanoseconds of that second (json-int)
- "vm-clock-sec": the guest's clock at that time (json-int)
- "vm-clock-nsec": nanoseconds of that second (json-int)

Example:

-> { "execute": "blockdev-snapshot-delete-internal-sync",
     "arguments": { "device": "ide-hd0", "name": "monday" } }
<- { "return": { "id": "1", "name": "monday", "vm-state-size": 0,
                 "date-sec": 1763758800, "date-nsec": 250000000,
                 "vm-clock-sec": 0, "vm-clock-nsec": 0 } }

EQMP

    {
        .name       = "x-blockdev-snapshot-revert",
        .args_type  = "device:B,id:s?,name:s?",
        .params     = "device [id] [name]",
        .help       = "go back to a snapshot inside the image",
        .mhandler.cmd_new = qmp_marshal_input_x_blockdev_snapshot_revert,
    },

SQMP
x-blockdev-snapshot-revert
--------------------------

Make the disk what it was when a snapshot inside the image was taken. What has
been written since is gone, unless another snapshot has it; the snapshot stays.
The disk may be exported, but a guest that has it mounted must be stopped first.
If both "id" and "name" are given, one snapshot must match both; at least one
must be given.

Arguments:

- "device": the drive or node (json-string)
- "id": the snapshot's id (json-string, optional)
- "name": the snapshot's name (json-string, optional)

Return a json-object about the snapshot, as
blockdev-snapshot-delete-internal-sync does.

Example:

-> { "execute": "x-blockdev-snapshot-revert",
     "arguments": { "device": "ide-hd0", "name": "monday" } }
<- { "return": { "id": "1", "name": "monday", "vm-state-size": 0,
                 "date-sec": 1763758800, "date-nsec": 250000000,
                 "vm-clock-sec": 0, "vm-clock-nsec": 0 } }

EQMP

    {
        .name       = "drive-backup",
        .args_type  = "job-id:s?,device:B,sync:s,speed:i?,compress:b?,"
                      "on-source-error:s?,on-target-error:s?,auto-finalize:b?,"
                      "auto-dismiss:b?,filter-node-name:s?,x-perf:q?,target:s,"
                      "format:s?,mode:s?",
        .params     = "sync device target [speed] [mode] [format] ...",
        .help       = "copy a disk as it is now to a file",
        .mhandler.cmd_new = qmp_marshal_input_drive_backup,
    },

SQMP
drive-backup
------------

Copy a disk as it is now to a file, while guests go on using it. If the target is
an existing file or device it is used, otherwise a new file is made. A job does
it: BLOCK_JOB_COMPLETED tells when the copy is whole.

Arguments:

- "device": the drive or node (json-string)
- "target": the file or device that is written (json-string)
- "format": the target's format; by default that of the disk, or with "mode"
  "existing" what it looks like (json-string, optional)
- "mode": "absolute-paths" (the default) makes a new image in the target,
  "existing" uses the one that is there (json-string, optional)
- "sync": what is copied (json-string): "full" (all that the disk shows), "top"
  (what its topmost image has), or "none" (what guests are about to change; such
  a job runs until it is cancelled)
- "job-id": the id of the job, by default the name of its drive (json-string,
  optional)
- "speed": bytes per second, 0 for no limit (json-int, optional)
- "compress": write compressed clusters (json-bool, optional)
- "on-source-error": what to do when a read fails (json-string, optional):
  "report" (the default), "ignore" (try again), "stop" (pause the job), "enospc"
  (pause it where space is short); the last two are for nodes, and drives with an
  io-status
- "on-target-error": what to do when a write fails (json-string, optional), as
  above
- "auto-finalize": conclude without "job-finalize" (json-bool, optional, default
  true)
- "auto-dismiss": forget the job when it has concluded (json-bool, optional,
  default true)
- "filter-node-name": the name of the filter above the disk while the job runs
  (json-string, optional)
- "x-perf": how the copy is made (json-object, optional); see the reference

Example:

-> { "execute": "drive-backup",
     "arguments": { "device": "ide-hd0", "sync": "full",
                    "target": "backup.qcow2" } }
<- { "return": {} }

EQMP

    {
        .name       = "blockdev-backup",
        .args_type  = "job-id:s?,device:B,sync:s,speed:i?,compress:b?,"
                      "on-source-error:s?,on-target-error:s?,auto-finalize:b?,"
                      "auto-dismiss:b?,filter-node-name:s?,x-perf:q?,target:B",
        .params     = "sync device target [speed] ...",
        .help       = "copy a disk as it is now to a node",
        .mhandler.cmd_new = qmp_marshal_input_blockdev_backup,
    },

SQMP
blockdev-backup
---------------

Copy a disk as it is now to a node, while guests go on using it. A job does it:
BLOCK_JOB_COMPLETED tells when the copy is whole.

Arguments:

- "device": the drive or node (json-string)
- "target": the node or drive that is written (json-string)
- "sync": what is copied (json-string): "full" (all that the disk shows), "top"
  (what its topmost image has), or "none" (what guests are about to change; such
  a job runs until it is cancelled)
- "job-id": the id of the job, by default the name of its drive (json-string,
  optional)
- "speed": bytes per second, 0 for no limit (json-int, optional)
- "compress": write compressed clusters (json-bool, optional)
- "on-source-error": what to do when a read fails (json-string, optional):
  "report" (the default), "ignore" (try again), "stop" (pause the job), "enospc"
  (pause it where space is short); the last two are for nodes, and drives with an
  io-status
- "on-target-error": what to do when a write fails (json-string, optional), as
  above
- "auto-finalize": conclude without "job-finalize" (json-bool, optional, default
  true)
- "auto-dismiss": forget the job when it has concluded (json-bool, optional,
  default true)
- "filter-node-name": the name of the filter above the disk while the job runs
  (json-string, optional)
- "x-perf": how the copy is made (json-object, optional); see the reference

Example:

-> { "execute": "blockdev-backup",
     "arguments": { "device": "ide-hd0", "job-id": "backup0",
                    "sync": "full", "target": "disk0" } }
<- { "return": {} }

EQMP

    {
        .name       = "block-job-set-speed",
        .args_type  = "device:B,speed:o",
        .params     = "device speed",
        .help       = "change how fast a job may be",
        .mhandler.cmd_new = qmp_marshal_input_block_job_set_speed,
    },

SQMP
block-job-set-speed
-------------------

Change how fast a block job may be.

Arguments:

- "device": the id of the job, which by default is the name of its device
  (json-string)
- "speed": bytes per second, 0 for no limit (json-int)

Example:

-> { "execute": "block-job-set-speed",
     "arguments": { "device": "ide-hd0", "speed": 10485760 } }
<- { "return": {} }

EQMP

    {
        .name       = "block-job-cancel",
        .args_type  = "device:B,force:b?",
        .params     = "device [force]",
        .help       = "end a block job",
        .mhandler.cmd_new = qmp_marshal_input_block_job_cancel,
    },

SQMP
block-job-cancel
----------------

End a block job. Events tell when it is gone.

Arguments:

- "device": the id of the job, which by default is the name of its device
  (json-string)
- "force": also while it is paused (json-bool, optional)

Example:

-> { "execute": "block-job-cancel",
     "arguments": { "device": "ide-hd0" } }
<- { "return": {} }

EQMP

    {
        .name       = "block-job-pause",
        .args_type  = "device:B",
        .params     = "device",
        .help       = "hold a block job",
        .mhandler.cmd_new = qmp_marshal_input_block_job_pause,
    },

SQMP
block-job-pause
---------------

Hold a block job. It is in the state "paused" when its requests under way have ended.

Arguments:

- "device": the id of the job, which by default is the name of its device
  (json-string)

Example:

-> { "execute": "block-job-pause",
     "arguments": { "device": "ide-hd0" } }
<- { "return": {} }

EQMP

    {
        .name       = "block-job-resume",
        .args_type  = "device:B",
        .params     = "device",
        .help       = "let a block job go on",
        .mhandler.cmd_new = qmp_marshal_input_block_job_resume,
    },

SQMP
block-job-resume
----------------

Let a block job go on that was paused, by a client or by an error.

Arguments:

- "device": the id of the job, which by default is the name of its device
  (json-string)

Example:

-> { "execute": "block-job-resume",
     "arguments": { "device": "paused" } }
<- { "return": {} }

EQMP

    {
        .name       = "block-job-complete",
        .args_type  = "device:B",
        .params     = "device",
        .help       = "let a block job do its last step",
        .mhandler.cmd_new = qmp_marshal_input_block_job_complete,
    },

SQMP
block-job-complete
------------------

Let a block job do its last step that is "ready". None of the present types is.

Arguments:

- "device": the id of the job, which by default is the name of its device
  (json-string)

Example:

-> { "execute": "block-job-complete",
     "arguments": { "device": "ide-hd0" } }
<- { "error": { "class": "GenericError",
                "desc": "Job 'ide-hd0' in state 'running' cannot accept command verb 'complete'" } }

EQMP

    {
        .name       = "block-job-finalize",
        .args_type  = "id:s",
        .params     = "id",
        .help       = "let a block job conclude",
        .mhandler.cmd_new = qmp_marshal_input_block_job_finalize,
    },

SQMP
block-job-finalize
------------------

Let a block job conclude that is "pending", with all that end together with it.

Arguments:

- "id": the id of the job (json-string)

Example:

-> { "execute": "block-job-finalize",
     "arguments": { "id": "pending" } }
<- { "return": {} }

EQMP

    {
        .name       = "block-job-dismiss",
        .args_type  = "id:s",
        .params     = "id",
        .help       = "forget a block job",
        .mhandler.cmd_new = qmp_marshal_input_block_job_dismiss,
    },

SQMP
block-job-dismiss
-----------------

Forget a block job that is "concluded".

Arguments:

- "id": the id of the job (json-string)

Example:

-> { "execute": "block-job-dismiss",
     "arguments": { "id": "done" } }
<- { "return": {} }

EQMP

    {
        .name       = "job-cancel",
        .args_type  = "id:s",
        .params     = "id",
        .help       = "end a job",
        .mhandler.cmd_new = qmp_marshal_input_job_cancel,
    },

SQMP
job-cancel
----------

End a job. Events tell when it is gone.

Arguments:

- "id": the id of the job (json-string)

Example:

-> { "execute": "job-cancel",
     "arguments": { "id": "ide-hd0" } }
<- { "return": {} }

EQMP

    {
        .name       = "job-pause",
        .args_type  = "id:s",
        .params     = "id",
        .help       = "hold a job",
        .mhandler.cmd_new = qmp_marshal_input_job_pause,
    },

SQMP
job-pause
---------

Hold a job. It is in the state "paused" when its requests under way have ended.

Arguments:

- "id": the id of the job (json-string)

Example:

-> { "execute": "job-pause",
     "arguments": { "id": "ide-hd0" } }
<- { "return": {} }

EQMP

    {
        .name       = "job-resume",
        .args_type  = "id:s",
        .params     = "id",
        .help       = "let a job go on",
        .mhandler.cmd_new = qmp_marshal_input_job_resume,
    },

SQMP
job-resume
----------

Let a job go on that was paused, by a client or by an error.

Arguments:

- "id": the id of the job (json-string)

Example:

-> { "execute": "job-resume",
     "arguments": { "id": "paused" } }
<- { "return": {} }

EQMP

    {
        .name       = "job-complete",
        .args_type  = "id:s",
        .params     = "id",
        .help       = "let a job do its last step",
        .mhandler.cmd_new = qmp_marshal_input_job_complete,
    },

SQMP
job-complete
------------

Let a job do its last step that is "ready". None of the present types is.

Arguments:

- "id": the id of the job (json-string)

Example:

-> { "execute": "job-complete",
     "arguments": { "id": "ide-hd0" } }
<- { "error": { "class": "GenericError",
                "desc": "Job 'ide-hd0' in state 'running' cannot accept command verb 'complete'" } }

EQMP

    {
        .name       = "job-finalize",
        .args_type  = "id:s",
        .params     = "id",
        .help       = "let a job conclude",
        .mhandler.cmd_new = qmp_marshal_input_job_finalize,
    },

SQMP
job-finalize
------------

Let a job conclude that is "pending", with all that end together with it.

Arguments:

- "id": the id of the job (json-string)

Example:

-> { "execute": "job-finalize",
     "arguments": { "id": "pending" } }
<- { "return": {} }

EQMP

    {
        .name       = "job-dismiss",
        .args_type  = "id:s",
        .params     = "id",
        .help       = "forget a job",
        .mhandler.cmd_new = qmp_marshal_input_job_dismiss,
    },

SQMP
job-dismiss
-----------

Forget a job that is "concluded".

Arguments:

- "id": the id of the job (json-string)

Example:

-> { "execute": "job-dismiss",
     "arguments": { "id": "done" } }
<- { "return": {} }

EQMP

    {
        .name       = "query-block-jobs",
        .args_type  = "",
        .help       = "show all block jobs",
        .mhandler.cmd_new = qmp_marshal_input_query_block_jobs,
    },

SQMP
query-block-jobs
----------------

Show all block jobs, the newest first.

Return a json-array of json-objects, each with:

- "type": what it does (json-string)
- "device": its id (json-string)
- "len": bytes that will be done when all are (json-int)
- "offset": bytes that are done (json-int)
- "busy": it does something now (json-bool)
- "paused": it is held (json-bool)
- "speed": bytes per second that it may do, 0 for no limit (json-int)
- "io-status": the error that holds it: "ok", "failed", "nospace" (json-string)
- "ready": it can be completed (json-bool)
- "status": its state (json-string)
- "auto-finalize", "auto-dismiss": as it was started (json-bool)
- "error": why it has failed (json-string, only then)
- "started-at": when it was made, in seconds since 1970 (json-int)
- "rate": bytes done in a second, of late (json-int)
- "time-left": seconds until all is done (json-int, where it can be said)

Example:

-> { "execute": "query-block-jobs" }
<- { "return": [
     { "type": "backup", "device": "ide-hd0", "len": 1073741824, "offset": 0,
       "busy": false, "paused": false, "speed": 0, "io-status": "ok",
       "ready": false, "status": "running", "auto-finalize": true,
       "auto-dismiss": true, "started-at": 1763758800, "rate": 0 } ] }

EQMP

    {
        .name       = "query-jobs",
        .args_type  = "",
        .help       = "show all jobs",
        .mhandler.cmd_new = qmp_marshal_input_query_jobs,
    },

SQMP
query-jobs
----------

Show all jobs, the newest first.

Return a json-array of json-objects, each with:

- "id": its id (json-string)
- "type": what it does (json-string)
- "status": its state (json-string)
- "current-progress": how much is done (json-int)
- "total-progress": how much will be done when all is (json-int)
- "error": why it has failed (json-string, only then)
- "started-at", "rate", "time-left": as in query-block-jobs

Example:

-> { "execute": "query-jobs" }
<- { "return": [
     { "id": "ide-hd0", "type": "backup", "status": "running",
       "current-progress": 0, "total-progress": 1073741824,
       "started-at": 1763758800, "rate": 0 } ] }

EQMP

    {
        .name       = "transaction",
        .args_type  = "actions:q,properties:q?,x-dry-run:b?",
        .params     = "actions [properties] [x-dry-run]",
        .help       = "carry out several actions, all or none",
        .mhandler.cmd_new = qmp_marshal_input_transaction,
    },

SQMP
transaction
-----------

Carry out several actions as one, each on what those before it have left. If one
of them fails nothing has happened, and its error is the answer.

Arguments:

- "actions": the actions (json-array of json-objects), each with:
  - "type": "blockdev-snapshot", "blockdev-snapshot-sync",
    "blockdev-snapshot-internal-sync",
    "x-blockdev-snapshot-delete-internal-sync", "x-blockdev-snapshot-revert", or
    "abort", which always fails (json-string)
  - "data": the arguments of the command of that name (json-object)
- "properties": what holds for the transaction (json-object, optional)
  - "completion-mode": "individual" (default) or "grouped", for actions that begin
    jobs: when one fails the others are cancelled (json-string, optional)
- "x-dry-run": answer what each action would do, or why it cannot be done, and
  change nothing (json-bool, optional)

Examples:

-> { "execute": "transaction",
     "arguments": { "actions": [
         { "type": "blockdev-snapshot-internal-sync",
           "data": { "device": "ide-hd0", "name": "tuesday" } },
         { "type": "blockdev-snapshot-internal-sync",
           "data": { "device": "ide-hd1", "name": "tuesday" } } ] } }
<- { "return": {} }

Go back by a day, and keep what there was:

-> { "execute": "transaction",
     "arguments": { "actions": [
         { "type": "blockdev-snapshot-internal-sync",
           "data": { "device": "ide-hd0", "name": "friday" } },
         { "type": "x-blockdev-snapshot-revert",
           "data": { "device": "ide-hd0", "name": "thursday" } },
         { "type": "x-blockdev-snapshot-delete-internal-sync",
           "data": { "device": "ide-hd0", "name": "thursday" } } ] } }
<- { "return": {} }

4. Exports
==========

EQMP

    {
        .name       = "nbd-server-start",
        .args_type  = "addr:q,handshake-max-seconds:i?,max-connections:i?",
        .params     = "addr [handshake-max-seconds] [max-connections]",
        .help       = "start the NBD server",
        .mhandler.cmd_new = qmp_marshal_input_nbd_server_start,
    },

SQMP
nbd-server-start
----------------

Start the NBD server.

Arguments:

- "addr": where it listens (json-object)
  - "type": "inet" or "unix" (json-string)
  - "data": "host" and "port", or "path" (json-object)
- "handshake-max-seconds": how long a client may take to ask for an export, 0
  for no limit (json-int, optional, default: 10)
- "max-connections": how many clients at a time, 0 for no limit
  (json-int, optional, default: 100)

Example:

-> { "execute": "nbd-server-start",
     "arguments": { "addr": { "type": "unix",
                              "data": { "path": "nbd.sock" } } } }
<- { "return": {} }

EQMP

    {
        .name       = "nbd-server-stop",
        .args_type  = "",
        .help       = "stop the NBD server and take away its exports",
        .mhandler.cmd_new = qmp_marshal_input_nbd_server_stop,
    },

SQMP
nbd-server-stop
---------------

Stop the NBD server. Its exports go, and its clients are cut off.

Arguments: None.

Example:

-> { "execute": "nbd-server-stop" }
<- { "return": {} }

EQMP

    {
        .name       = "nbd-server-add",
        .args_type  = "name:s?,description:s?,device:B,writable:b?",
        .params     = "device [name] [description] [writable]",
        .help       = "export a drive or node through the NBD server",
        .mhandler.cmd_new = qmp_marshal_input_nbd_server_add,
    },

SQMP
nbd-server-add
--------------

Export a drive or node through the NBD server. New clients use block-export-add.

Arguments:

- "device": the drive or node (json-string)
- "name": what NBD clients ask for (json-string, optional, default: "device")
- "description": a text for people (json-string, optional)
- "writable": whether clients may write (json-bool, optional, default: false)

Example:

-> { "execute": "nbd-server-add",
     "arguments": { "device": "ide-hd0", "writable": true } }
<- { "return": {} }

EQMP

    {
        .name       = "nbd-server-remove",
        .args_type  = "name:s,mode:s?",
        .params     = "name [mode]",
        .help       = "take away an NBD export",
        .mhandler.cmd_new = qmp_marshal_input_nbd_server_remove,
    },

SQMP
nbd-server-remove
-----------------

Take away an NBD export. New clients use block-export-del.

Arguments:

- "name": what NBD clients ask for (json-string)
- "mode": "safe" refuses while a client is connected, "hard" cuts clients off
  (json-string, optional, default: "safe")

Example:

-> { "execute": "nbd-server-remove",
     "arguments": { "name": "ide-hd0", "mode": "hard" } }
<- { "return": {} }

EQMP

    {
        .name       = "block-export-add",
        .args_type  = "options:O",
        .params     = "type id node-name [writable] [writethrough] [options]",
        .help       = "export a node",
        .mhandler.cmd_new = qmp_marshal_input_block_export_add,
    },

SQMP
block-export-add
----------------

Export a node.

Arguments:

- "type": "nbd" (json-string)
- "id": id of the export (json-string)
- "node-name": the node, or the drive whose guests the clients are (json-string)
- "writable": whether clients may write (json-bool, optional, default: false)
- "writethrough": whether each write is on stable storage before it is answered
  (json-bool, optional, default: false)
- "name": what NBD clients ask for (json-string, optional, default: the node's
  name)
- "description": a text for people (json-string, optional)

Example:

-> { "execute": "block-export-add",
     "arguments": { "type": "nbd", "id": "export0", "node-name": "disk0",
                    "writable": true } }
<- { "return": {} }

EQMP

    {
        .name       = "block-export-del",
        .args_type  = "id:s,mode:s?",
        .params     = "id [mode]",
        .help       = "take away an export",
        .mhandler.cmd_new = qmp_marshal_input_block_export_del,
    },

SQMP
block-export-del
----------------

Take away an export. The event BLOCK_EXPORT_DELETED tells when it is gone.

Arguments:

- "id": the export (json-string)
- "mode": "safe" refuses while a client is connected, "hard" cuts clients off
  (json-string, optional, default: "safe")

Example:

-> { "execute": "block-export-del",
     "arguments": { "id": "export0", "mode": "hard" } }
<- { "return": {} }

EQMP

    {
        .name       = "query-block-exports",
        .args_type  = "",
        .help       = "list the exports",
        .mhandler.cmd_new = qmp_marshal_input_query_block_exports,
    },

SQMP
query-block-exports
-------------------

List the exports.

Return a json-array of json-objects, each with:

- "id": its id (json-string)
- "type": its type (json-string)
- "node-name": the node (json-string)
- "shutting-down": whether it is being taken away (json-bool)

Example:

-> { "execute": "query-block-exports" }
<- { "return": [ { "id": "export0", "type": "nbd", "node-name": "disk0",
                   "shutting-down": false } ] }

EQMP
