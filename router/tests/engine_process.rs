//! The router's binary with a scripted launcher: arguments, exit codes, and whom it outlives.

#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const PATIENCE: Duration = Duration::from_secs(10);

/// A directory with a control socket that somebody listens on.
struct Place {
    directory: PathBuf,
    launcher: UnixListener,
}

impl Place {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("router-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let directory = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&directory).unwrap();
        let launcher = UnixListener::bind(directory.join("control")).unwrap();
        launcher.set_nonblocking(true).unwrap();
        Self { directory, launcher }
    }

    fn router(&self, flags: &[&str]) -> Router {
        self.start(Command::new(env!("CARGO_BIN_EXE_text-generation-router")), flags)
    }

    /// A router that begins with these limits of open files.
    fn limited_router(&self, soft: u32, hard: u32, flags: &[&str]) -> Router {
        let mut command = Command::new("sh");
        let script = format!("ulimit -Sn {soft} && ulimit -Hn {hard} && exec \"$0\" \"$@\"");
        command.args(["-c", &script, env!("CARGO_BIN_EXE_text-generation-router")]);
        self.start(command, flags)
    }

    fn start(&self, mut command: Command, flags: &[&str]) -> Router {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/docs-llama-7m");
        command.arg("--tokenizer-name").arg(model).args(["--model-id", "m", "--hostname", "127.0.0.1"]);
        command.arg("--control-socket").arg(self.directory.join("control"));
        command.arg("--admin-socket").arg(self.directory.join("admin")).args(flags);
        Router(command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
    }

    /// The router's connection, once it is there and the router serves its admin socket.
    fn accept(&self) -> std::os::unix::net::UnixStream {
        let connection = eventually(|| self.launcher.accept().ok()).0;
        eventually(|| self.directory.join("admin").exists().then_some(()));
        connection
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.directory).unwrap();
    }
}

fn eventually<T>(mut poll: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = poll() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited too long");
        std::thread::sleep(Duration::from_millis(5));
    }
}

struct Router(Child);

impl Router {
    fn ended(&mut self) -> ExitStatus {
        eventually(|| self.0.try_wait().unwrap())
    }

    /// Everything it said, once it has ended.
    fn said(&mut self) -> String {
        let read = |from: &mut dyn std::io::Read| std::io::read_to_string(from).unwrap();
        read(self.0.stdout.as_mut().unwrap()) + &read(self.0.stderr.as_mut().unwrap())
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn flags_that_cannot_be_are_refused_with_code_2_and_their_name() {
    let place = Place::new();
    for (flags, expected) in [
        (&["--max-concurrent-requests", "abc"][..], "--max-concurrent-requests"),
        (&["--max-input-tokens", "10", "--max-total-tokens", "5"], "--max-input-tokens 10 must be less than"),
        (&["--no-such-flag"], "--no-such-flag"),
    ] {
        let mut router = place.router(flags);
        assert_eq!(router.ended().code(), Some(2));
        let said = router.said();
        assert!(said.contains(expected), "{said}");
    }
}

#[test]
fn a_port_in_use_ends_the_start_with_its_number() {
    let place = Place::new();
    let occupied = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = occupied.local_addr().unwrap().port().to_string();
    let mut router = place.router(&["--port", &port]);
    assert_eq!(router.ended().code(), Some(1));
    let said = router.said();
    assert!(said.contains(&format!("127.0.0.1:{port}")), "{said}");
}

#[test]
fn a_tokenizer_that_cannot_be_read_ends_the_start_with_a_code_of_its_own() {
    let place = Place::new();
    std::fs::write(place.directory.join("tokenizer.json"), "{").unwrap();
    for directory in [place.directory.clone(), place.directory.join("nothing")] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_text-generation-router"));
        command.arg("--tokenizer-name").arg(&directory).args(["--model-id", "m", "--control-socket", "nowhere"]);
        let ended = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let mut router = Router(ended.unwrap());
        assert_eq!(router.ended().code(), Some(78));
        let said = router.said();
        let file = directory.join("tokenizer.json").display().to_string();
        assert_eq!(said.lines().filter(|line| line.contains(&file)).count(), 1, "{said}");
    }
}

#[test]
fn connections_beyond_the_limit_of_open_files_take_the_place_of_idle_ones() {
    const HARD: u32 = 64;
    let place = Place::new();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut router = place.limited_router(32, HARD, &["--port", &port.to_string()]);
    let launcher = place.accept();
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", router.0.id())).unwrap();
    let open_files = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    assert_eq!(open_files.split_whitespace().nth(3), Some(HARD.to_string().as_str()), "raised: {open_files}");
    let mut open = vec![];
    for number in 0..2 * HARD {
        let mut client = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client.write_all(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        let mut answer = [0; 12];
        client.read_exact(&mut answer).unwrap_or_else(|error| panic!("connection {number}: {error}"));
        assert_eq!(&answer, b"HTTP/1.1 200");
        open.push(client);
    }
    drop(launcher);
    router.ended();
    let said = router.said();
    let told = said.lines().filter(|line| line.contains("connections cannot be accepted")).count();
    assert_eq!(told, 1, "once per episode: {said}");
}

#[test]
fn a_launcher_that_is_not_there_ends_the_start_with_its_socket() {
    let place = Place::new();
    std::fs::remove_file(place.directory.join("control")).unwrap();
    let mut router = place.router(&["--port", "0"]);
    assert_eq!(router.ended().code(), Some(1));
    let said = router.said();
    assert!(said.contains("control"), "{said}");
}

#[test]
fn a_termination_signal_ends_an_idle_router_with_code_0() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let place = Place::new();
        let mut router = place.router(&["--port", "0"]);
        let _launcher = place.accept();
        kill(Pid::from_raw(router.0.id() as i32), signal).unwrap();
        assert_eq!(router.ended().code(), Some(0), "{signal}: {}", router.said());
    }
}

#[test]
fn a_launcher_that_goes_away_takes_the_router_with_it() {
    let place = Place::new();
    let mut router = place.router(&["--port", "0"]);
    drop(place.accept());
    assert_eq!(router.ended().code(), Some(1));
}

#[test]
fn the_end_of_standard_input_ends_the_router_if_it_is_told_so() {
    let place = Place::new();
    let mut router = place.router(&["--port", "0", "--exit-with-stdin"]);
    let _launcher = place.accept();
    drop(router.0.stdin.take());
    assert_eq!(router.ended().code(), Some(1));
}
