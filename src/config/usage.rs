//! What `--help` and `--version` print.

/// The usage.
pub const USAGE: &str = "\
Usage: qblockd [options]
       qblockd check [options] <image>
       qblockd amend [options] -o <option>=<value>[,...] <image>
A storage daemon that speaks QMP: serves disk images over NBD, takes and deletes snapshots while they are in use.

  -h, --help             display this help and exit
  -V, --version          output version information and exit

  --drive [id=<id>],file=<image>[,format=qcow2|raw|auto][,size=<bytes, or with K M G T>]
          [,cache=none|writeback|writethrough|directsync|unsafe][,aio=threads|io_uring|native]
          [,readonly=on|off][,discard=ignore|unmap][,detect-zeroes=off|on|unmap]
          [,werror=enospc|report|ignore|stop][,rerror=report|ignore|stop]
                         serve an image; with size= it is created if missing. Every drive is exported over NBD
                         under its id. Without --qmp, --monitor and --nbd-server, sockets are made and printed.
                         Without format= it is qcow2; auto looks at the image, and at backing files whose format
                         is not named. Nothing else is ever guessed. When writes (werror) or reads (rerror) fail
                         clients are told (report), or the requests of all drives wait for the QMP command cont:
                         always (stop), or where space is short (enospc, what happens unless werror= is given)
  --qmp unix:<path>|tcp:<host>:<port>
                         serve QMP
  --nbd-server unix:<path>|tcp:<host>:<port>
                         serve NBD
  --state-dir <folder>   where transactions are written down, so that they are all or nothing across a crash, too.
                         What one has cut off is finished or taken back at the next start

As in qemu-storage-daemon; values are key=value lists or, with nodes and exports, JSON:

  --blockdev [driver=]<driver>[,node-name=<name>][,discard=ignore|unmap]
             [,cache.direct=on|off][,cache.no-flush=on|off]
             [,read-only=on|off][,auto-read-only=on|off]
             [,detect-zeroes=on|off|unmap][,<driver's own parameters>...]
                         add a node (file, host_device, raw, qcow2, null-co)
  --chardev socket,id=<id>,path=<path>|host=<host>,port=<port>,server=on,wait=off
  --monitor [chardev=]<id>[,mode=control][,pretty=on|off]
                         serve QMP on a character device
  --nbd-server addr.type=unix,addr.path=<path>[,max-connections=<n>]
  --nbd-server addr.type=inet,addr.host=<host>,addr.port=<port>[,max-connections=<n>]
  --export [type=]nbd,id=<id>,node-name=<node>[,name=<export name>][,writable=on|off]
                         export a node (needs --nbd-server)
  --pidfile <path>       write the process id to a file after startup
  --daemonize            leave the terminal once startup is complete

check looks at a qcow2 image that is not in use, as qemu-img check does, and exits with 0 if nothing is wrong, 1 if that
cannot be found out, 2 if there are errors, and 3 if there are leaks only:

  -r, --repair[=leaks|all]
                         put right what is wrong: leaks only, or all errors. Nothing is ever guessed: what refcounts
                         do not cure is named and left as it is
  --output=human|json    print sentences, or one JSON object as qemu-img does (--format is the same)
  -q, --quiet            print errors only

amend changes what a qcow2 image that is not in use says about itself, as qemu-img amend does; -o help lists the options:

  -o <option>=<value>[,...]
                         what to change. All of it but size= happens at once or not at all
  --data-file=<file>     the file with the guest's data, for an image that keeps them apart

Options are followed in their order. Log lines go to stderr; RUST_LOG=debug shows more of them.
";

/// What `qblockd amend` can change.
pub const AMEND_OPTIONS: &str = "\
Amend options for 'qcow2':
  backing_file=<str>     - File name of a base image, which is neither opened nor compared (as in qemu-img rebase -u);
                           empty for none
  backing_fmt=<str>      - Image format of the base image
  compat=<str>           - Compatibility level (v3 [1.1])
  data_file_raw=<bool (on/off)> - The external data file must stay valid as a raw image (off)
  lazy_refcounts=<bool (on/off)> - Postpone refcount updates
  refcount_bits=<num>    - Width of a reference count entry in bits (the one it has)
  size=<size>            - Virtual disk size
";

/// The version, in one line.
pub fn version() -> String {
    format!("qblockd version {}", env!("CARGO_PKG_VERSION"))
}
