//! Daemons under test: started in a folder of their own, spoken to over a raw socket, always ended.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

/// How long anything may take here, on a busy machine too. Only what hangs takes longer.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// The program under test and its peers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Program {
    Qblockd,
    QemuStorageDaemon,
    /// The emulator, without a guest: it has drives. See [`emulator`].
    Qemu,
}

/// The emulator that the user names. The recorded answers are those of 10.0.2.
pub(crate) fn emulator() -> Option<OsString> {
    std::env::var_os("QBLOCKD_TEST_QEMU")
}

impl Program {
    /// A command that runs it.
    pub(crate) fn command(self) -> Command {
        match self {
            Program::Qblockd => Command::new(env!("CARGO_BIN_EXE_qblockd")),
            Program::QemuStorageDaemon => Command::new("qemu-storage-daemon"),
            Program::Qemu => Command::new(emulator().unwrap()),
        }
    }
}

/// A number of the environment.
pub(crate) fn setting(name: &str, absent: u64) -> u64 {
    std::env::var(name).map_or(absent, |text| text.parse().expect(name))
}

/// What random choices begin with: `QBLOCKD_CRASH_SEED`. Without one it is always the same, so that the same code does the same.
pub(crate) fn seed() -> u64 {
    let seed = setting("QBLOCKD_CRASH_SEED", 1);
    println!("QBLOCKD_CRASH_SEED={seed}");
    seed
}

/// Whether these programs are installed. If one is not, the test says so and passes.
pub(crate) fn need(tools: &[&str]) -> Option<()> {
    let path = std::env::var_os("PATH")?;
    for tool in tools {
        if !std::env::split_paths(&path).any(|folder| folder.join(tool).exists()) {
            eprintln!("{tool} is not installed: nothing is tested");
            return None;
        }
    }
    Some(())
}

/// A Python with QEMU's `qemu.qmp`: that of `tests/run`, or else the one that is there. If it has none, the test
/// says so and passes.
pub(crate) fn python() -> Option<OsString> {
    let python = std::env::var_os("QBLOCKD_TEST_PYTHON").unwrap_or_else(|| "python3".into());
    let installed = Command::new(&python)
        .args(["-c", "import qemu.qmp"])
        .stderr(Stdio::null())
        .status();
    if !installed.is_ok_and(|status| status.success()) {
        eprintln!("Python's qemu.qmp is not installed: nothing is tested");
        return None;
    }
    Some(python)
}

/// Waits until something is so.
pub(crate) fn until(is_so: impl Fn() -> bool, what: &str) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A client of a socket that is there.
pub(crate) fn connect(socket: &Path) -> Qmp {
    Qmp::new(UnixStream::connect(socket).unwrap())
}

/// Runs a line of shell to its end in a folder and insists on its success.
pub(crate) fn tool(folder: &Path, line: &str) -> String {
    let output = Command::new("sh")
        .args(["-c", line])
        .current_dir(folder)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{line}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A block device on a file; detached on drop.
pub(crate) struct Loop(pub(crate) String);

impl Loop {
    /// Where there are no such devices the test says so and passes.
    pub(crate) fn attach(file: &Path) -> Option<Loop> {
        let mut losetup = Command::new("losetup");
        let output = losetup.args(["-f", "--show"]).arg(file).output();
        if let Ok(output) = output
            && output.status.success()
        {
            let device = String::from_utf8_lossy(&output.stdout).trim().to_owned();
            return Some(Loop(device));
        }
        eprintln!("no loop device can be attached here: nothing is tested");
        None
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).output();
    }
}

/// Runs a daemon that is expected to end by itself.
pub(crate) fn run_to_end(program: Program, folder: &Path, arguments: &[&str]) -> Output {
    let mut command = program.command();
    command.args(arguments).current_dir(folder);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let _ = wait(&mut child);
    child.wait_with_output().unwrap()
}

/// The peer writes it when all of its options have been followed.
const PEER_PIDFILE: &str = "peer.pid";

/// A running daemon with a QMP monitor on `qmp.sock` of its folder.
pub(crate) struct Daemon {
    program: Program,
    child: Child,
    folder: PathBuf,
    /// Removed with the daemon, unless the folder is the caller's.
    _own: Option<TempDir>,
}

impl Daemon {
    /// Starts one in a new folder.
    pub(crate) fn start(program: Program, arguments: &[&str]) -> Daemon {
        let own = tempfile::tempdir().unwrap();
        let mut daemon = Daemon::start_in(program, own.path(), arguments);
        daemon._own = Some(own);
        daemon
    }

    /// Starts one in the caller's folder.
    pub(crate) fn start_in(program: Program, folder: &Path, arguments: &[&str]) -> Daemon {
        let mut command = program.command();
        let chardev = "socket,id=harness,path=qmp.sock,server=on,wait=off";
        command.args(["--chardev", chardev]);
        if program != Program::Qblockd {
            let _ = std::fs::remove_file(folder.join(PEER_PIDFILE));
            command.args(["--pidfile", PEER_PIDFILE]);
        }
        match program {
            Program::Qblockd | Program::QemuStorageDaemon => {
                command.args(["--monitor", "chardev=harness"])
            }
            Program::Qemu => command
                .args(["-machine", "none", "-nodefaults", "-display", "none"])
                .args(["-mon", "chardev=harness,mode=control"]),
        };
        let child = command
            .args(arguments)
            .current_dir(folder)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Daemon {
            program,
            child,
            folder: folder.to_owned(),
            _own: None,
        }
    }

    /// The path of a file in the daemon's folder.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Runs a program in the daemon's folder.
    pub(crate) fn tool(&self, line: &str) -> String {
        tool(&self.folder, line)
    }

    /// A client that has read the greeting and negotiated.
    pub(crate) fn qmp(&mut self) -> Qmp {
        let mut qmp = self.raw_qmp();
        assert_eq!(
            qmp.execute("qmp_capabilities", json!({})),
            json!({"return": {}})
        );
        qmp
    }

    /// Whether a client may come. The peer's monitor is set up by a thread of its own; who is accepted meanwhile is greeted
    /// twice, or never answered.
    fn ready(&self) -> bool {
        match self.program {
            Program::Qblockd => true,
            Program::QemuStorageDaemon | Program::Qemu => {
                let is_up = self.path(PEER_PIDFILE).exists();
                if is_up {
                    std::thread::sleep(Duration::from_millis(30));
                }
                is_up
            }
        }
    }

    /// A client that has read the greeting only.
    pub(crate) fn raw_qmp(&mut self) -> Qmp {
        let deadline = Instant::now() + PATIENCE;
        while !self.ready() && Instant::now() < deadline {
            if let Some(status) = self.child.try_wait().unwrap() {
                panic!("the daemon has ended: {status}");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        loop {
            match UnixStream::connect(self.path("qmp.sock")) {
                Ok(stream) => return Qmp::new(stream),
                Err(error) => assert!(Instant::now() < deadline, "qmp.sock: {error}"),
            }
            if let Some(status) = self.child.try_wait().unwrap() {
                panic!("the daemon has ended: {status}");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Sends SIGTERM and waits for the end.
    pub(crate) fn terminate(mut self) -> ExitStatus {
        self.terminated()
    }

    /// As [`Daemon::terminate`], and the folder stays.
    pub(crate) fn terminated(&mut self) -> ExitStatus {
        let status = Command::new("kill")
            .arg(self.child.id().to_string())
            .status();
        assert!(status.unwrap().success());
        wait(&mut self.child)
    }

    /// Waits for an end that has been asked for.
    pub(crate) fn wait(mut self) -> ExitStatus {
        wait(&mut self.child)
    }

    /// As [`Daemon::wait`], and the folder stays.
    pub(crate) fn exited(&mut self) -> ExitStatus {
        wait(&mut self.child)
    }

    /// Ends in order, by `quit` or by a signal, and within `bound`.
    pub(crate) fn ended_within(&mut self, bound: Duration, qmp: &mut Qmp, by_command: bool) {
        let begun = Instant::now();
        let status = match by_command {
            true => {
                qmp.ok("quit", json!({}));
                self.exited()
            }
            false => self.terminated(),
        };
        assert!(status.success(), "{status}");
        assert!(begun.elapsed() < bound, "{:?}", begun.elapsed());
    }

    /// Ends the process as a power cut would; the folder stays.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// The process id.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended as the test wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn wait(child: &mut Child) -> ExitStatus {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if Instant::now() > deadline {
            let _ = child.kill();
            panic!("the program did not end in time");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A client on a raw socket.
pub(crate) struct Qmp {
    reader: BufReader<UnixStream>,
    /// The greeting.
    pub(crate) greeting: Value,
    /// Events that came before or between replies, oldest first.
    pub(crate) events: Vec<Value>,
}

impl Qmp {
    fn new(stream: UnixStream) -> Qmp {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut qmp = Qmp {
            reader: BufReader::new(stream),
            greeting: Value::Null,
            events: Vec::new(),
        };
        qmp.greeting = qmp.receive();
        qmp
    }

    /// Sends bytes as they are.
    pub(crate) fn send(&mut self, text: &str) {
        self.reader.get_mut().write_all(text.as_bytes()).unwrap();
    }

    /// The next message, whatever it is.
    pub(crate) fn receive(&mut self) -> Value {
        serde_json::from_str(&self.line()).unwrap()
    }

    /// As [`Qmp::receive`], as text.
    pub(crate) fn line(&mut self) -> String {
        let mut line = String::new();
        self.reader.read_line(&mut line).unwrap();
        assert!(line.ends_with("\r\n"), "{line:?}");
        line
    }

    /// The next reply; events before it are kept.
    pub(crate) fn reply(&mut self) -> Value {
        loop {
            let message = self.receive();
            if message.get("event").is_none() {
                return message;
            }
            self.events.push(message);
        }
    }

    /// All messages until the daemon closes the connection.
    pub(crate) fn rest(&mut self) -> Vec<Value> {
        let mut text = String::new();
        self.reader.read_to_string(&mut text).unwrap();
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    /// Sends a line and gives back the reply to it.
    pub(crate) fn exchange(&mut self, line: &str) -> Value {
        self.send(line);
        self.reply()
    }

    /// Runs a command and gives back the whole reply.
    pub(crate) fn execute(&mut self, command: &str, arguments: Value) -> Value {
        self.exchange(&json!({"execute": command, "arguments": arguments}).to_string())
    }

    /// As [`Qmp::execute`]; nothing if the daemon ends before it has answered.
    pub(crate) fn try_execute(&mut self, command: &str, arguments: Value) -> Option<Value> {
        let message = json!({"execute": command, "arguments": arguments}).to_string();
        self.reader.get_mut().write_all(message.as_bytes()).ok()?;
        loop {
            let mut line = String::new();
            match self.reader.read_line(&mut line) {
                Ok(_) if line.ends_with("\r\n") => {}
                _ => return None,
            }
            let message: Value = serde_json::from_str(&line).unwrap();
            if message.get("event").is_none() {
                return Some(message);
            }
            self.events.push(message);
        }
    }

    /// Runs a command that must succeed, and gives back what it returns.
    pub(crate) fn ok(&mut self, command: &str, arguments: Value) -> Value {
        let mut reply = self.execute(command, arguments);
        match reply.get_mut("return") {
            Some(value) => value.take(),
            None => panic!("{command}: {reply}"),
        }
    }

    /// Runs a command that must fail, and gives back the error's class and sentence.
    pub(crate) fn error(&mut self, command: &str, arguments: Value) -> (String, String) {
        let reply = self.execute(command, arguments);
        let text = |key: &str| reply["error"][key].as_str().map(str::to_owned);
        match (text("class"), text("desc")) {
            (Some(class), Some(desc)) => (class, desc),
            _ => panic!("{command}: {reply}"),
        }
    }

    /// Waits until nothing is left to do behind snapshot operations, on any node.
    pub(crate) fn settled(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let nodes = self.ok("query-named-block-nodes", json!({"flat": true}));
            let is_busy = |node: &Value| {
                node.get("x-unsettled-tables").is_some() || node["image"]["dirty-flag"] == true
            };
            let nodes = nodes.as_array().unwrap();
            let Some(node) = nodes.iter().find(|node| is_busy(node)) else {
                return;
            };
            assert!(Instant::now() < deadline, "not settled: {node}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// All events up to one that is looked for, for which it waits: the last of those that are there.
    pub(crate) fn events_until(&mut self, is_it: impl Fn(&Value) -> bool) -> Vec<Value> {
        loop {
            if let Some(at) = self.events.iter().rposition(&is_it) {
                return self.events.drain(..=at).collect();
            }
            let message = self.receive();
            assert!(
                message.get("event").is_some(),
                "a reply nobody waits for: {message}"
            );
            self.events.push(message);
        }
    }

    /// Waits for an event of this name.
    pub(crate) fn event(&mut self, name: &str) -> Value {
        if let Some(at) = self.events.iter().position(|event| event["event"] == name) {
            return self.events.remove(at);
        }
        loop {
            let message = self.receive();
            if message["event"] == name {
                return message;
            }
            assert!(
                message.get("event").is_some(),
                "a reply nobody waits for: {message}"
            );
            self.events.push(message);
        }
    }
}
