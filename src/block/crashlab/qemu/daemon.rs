//! qemu-storage-daemon with a disk whose writes are logged.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::super::run::Problem;
use super::{run, write_log};

/// How long the daemon may take to start or to answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// A running daemon; killed when dropped.
#[derive(Debug)]
pub struct Daemon {
    process: Child,
    qmp: BufReader<UnixStream>,
    log: PathBuf,
    nbd: String,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Daemon {
    /// Serves the image as the export `disk`; every write to the file goes to `log`, which exists and is empty.
    pub fn start(dir: &Path, image: &Path, log: &Path) -> Result<Daemon, Problem> {
        let (nbd, qmp) = (dir.join("nbd.sock"), dir.join("qmp.sock"));
        for socket in [&nbd, &qmp] {
            let _ = std::fs::remove_file(socket);
        }
        let process = Command::new("qemu-storage-daemon")
            .arg("--blockdev")
            .arg(format!("file,node-name=image,filename={}", image.display()))
            .arg("--blockdev")
            .arg(format!("file,node-name=log,filename={}", log.display()))
            .args([
                "--blockdev",
                "blklogwrites,node-name=logged,file=image,log=log,log-super-update-interval=1",
            ])
            .args(["--blockdev", "qcow2,node-name=disk,file=logged"])
            .arg("--nbd-server")
            .arg(format!("addr.type=unix,addr.path={}", nbd.display()))
            .args([
                "--export",
                "nbd,id=disk,node-name=disk,name=disk,writable=on",
            ])
            .arg("--chardev")
            .arg(format!(
                "socket,id=qmp,path={},server=on,wait=off",
                qmp.display()
            ))
            .args(["--monitor", "qmp"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|error| format!("qemu-storage-daemon: {error}"))?;
        let mut daemon = Daemon {
            process,
            qmp: BufReader::new(connect(&qmp)?),
            log: log.to_owned(),
            nbd: format!("nbd+unix:///disk?socket={}", nbd.display()),
        };
        daemon.line()?;
        daemon.execute("qmp_capabilities", "{}")?;
        Ok(daemon)
    }

    /// Runs a command; its arguments are JSON.
    pub fn execute(&mut self, command: &str, arguments: &str) -> Result<(), Problem> {
        let request = format!("{{\"execute\": \"{command}\", \"arguments\": {arguments}}}\n");
        self.qmp
            .get_mut()
            .write_all(request.as_bytes())
            .map_err(|error| error.to_string())?;
        loop {
            let line = self.line()?;
            if line.contains("\"error\"") {
                return Err(format!("{command}: {line}"));
            }
            if line.contains("\"return\"") {
                return Ok(());
            }
        }
    }

    /// A guest's write of a file's bytes, and a flush.
    pub fn write(&self, at: u64, len: u64, data: &Path) -> Result<(), Problem> {
        let write = format!("write -s {} {at} {len}", data.display());
        let args = ["-f", "raw", "-c", write.as_str(), "-c", "flush", &self.nbd];
        let output = run("qemu-io", &args, &[0])?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        match text.contains("failed") {
            true => Err(text),
            false => Ok(()),
        }
    }

    /// How many entries the log has now.
    pub fn logged(&self) -> Result<usize, Problem> {
        let log = std::fs::read(&self.log).map_err(|error| error.to_string())?;
        write_log::entries(&log)
    }

    fn line(&mut self) -> Result<String, Problem> {
        let mut line = String::new();
        match self.qmp.read_line(&mut line) {
            Ok(0) => Err("qemu-storage-daemon has ended".to_owned()),
            Ok(_) => Ok(line),
            Err(error) => Err(format!("qemu-storage-daemon: {error}")),
        }
    }
}

fn connect(path: &Path) -> Result<UnixStream, Problem> {
    let start = Instant::now();
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => {
                let set = stream.set_read_timeout(Some(PATIENCE));
                set.map_err(|error| error.to_string())?;
                return Ok(stream);
            }
            Err(error) if start.elapsed() > PATIENCE => {
                return Err(format!("qemu-storage-daemon does not listen: {error}"));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}
