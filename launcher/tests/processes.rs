//! The launcher's program with fake children: what starts, what is replaced, what is left behind, how it ends.

#![allow(clippy::unwrap_used)] // A test file: helpers are not recognized as tests.

use std::fs::{self, File};
use std::net::TcpListener;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// The longest that anything in here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// Seconds, on a busy machine too: without waiting for what takes at least 30 (a grace, a stalled start, a download).
const SOON: Duration = Duration::from_secs(15);

/// A directory with a launcher and its fakes; whatever is still alive at the end is killed.
struct Stage {
    directory: PathBuf,
    port: u16,
    launchers: Vec<Child>,
}

impl Stage {
    fn new() -> Self {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("stage-{}-{number}", std::process::id()));
        fs::create_dir_all(directory.join("model")).unwrap();
        let launcher = Path::new(env!("CARGO_BIN_EXE_text-generation-launcher"));
        let fake = launcher.parent().unwrap().join("examples/fake");
        for (program, name) in [
            (launcher, "text-generation-launcher"),
            (&fake, "text-generation-server"),
            (&fake, "text-generation-router"),
        ] {
            fs::hard_link(program, directory.join(name)).unwrap();
        }
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        Self { directory, port, launchers: Vec::new() }
    }

    /// Starts a launcher; `fake` says what its children do wrong.
    fn launch(&mut self, fake: &str, flags: &str) -> usize {
        let index = self.launchers.len();
        let log = |name: &str| File::create(self.directory.join(format!("{name}-{index}"))).unwrap();
        let child = Command::new(self.directory.join("text-generation-launcher"))
            .args(["--model-id", "model", "--hostname", "127.0.0.1", "--shard-uds-path"])
            .arg(self.run_prefix())
            .args(["--port", &self.port.to_string()])
            .args(flags.split_whitespace())
            .current_dir(&self.directory)
            .env("FAKE", fake)
            .env("FAKE_DIR", &self.directory)
            .stdin(Stdio::null())
            .stdout(log("stdout"))
            .stderr(log("stderr"))
            .spawn()
            .unwrap();
        self.launchers.push(child);
        index
    }

    fn start(fake: &str, flags: &str) -> Self {
        let mut stage = Self::new();
        stage.launch(fake, flags);
        stage
    }

    /// Short: sockets live below it, and their paths are limited.
    fn run_prefix(&self) -> PathBuf {
        std::env::temp_dir().join(format!("launch-{}", self.port))
    }

    fn run_directories(&self) -> Vec<PathBuf> {
        let prefix = format!("launch-{}-", self.port);
        let entries = fs::read_dir(std::env::temp_dir()).unwrap().map(|entry| entry.unwrap().path());
        entries
            .filter(|path| path.file_name().unwrap().to_str().is_some_and(|name| name.starts_with(&prefix)))
            .collect()
    }

    fn text(&self, file: &str) -> String {
        String::from_utf8_lossy(&fs::read(self.directory.join(file)).unwrap_or_default()).into_owned()
    }

    fn stdout(&self) -> String {
        self.text("stdout-0")
    }

    fn stderr(&self) -> String {
        self.text("stderr-0")
    }

    /// What the routers noted, of one kind.
    fn notes(&self, kind: &str) -> Vec<Value> {
        let notes = self.text("router.log");
        notes
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok())
            .filter(|note| note["type"] == kind)
            .collect()
    }

    fn generation(&self, index: usize) -> Value {
        self.until("a generation", |stage| stage.notes("generation").get(index).cloned())
    }

    /// Process ids of all ranks and routers that ever were in a generation.
    fn children(&self) -> Vec<i32> {
        let generations = self.notes("generation");
        let ranks = generations.iter().flat_map(|note| note["ranks"].as_array().unwrap().clone());
        ranks.chain(self.notes("router")).map(|note| process_id(&note)).collect()
    }

    fn until<T>(&self, what: &str, mut look: impl FnMut(&Self) -> Option<T>) -> T {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(found) = look(self) {
                return found;
            }
            assert!(Instant::now() < end, "{what} did not come;\n{}\n{}", self.stdout(), self.stderr());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn until_logged(&self, text: &str) {
        self.until(text, |stage| stage.stdout().contains(text).then_some(()));
    }

    fn until_serving(&self) {
        self.until_logged("Connected: ready at http://127.0.0.1:");
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.launchers[0].id() as i32), signal).unwrap();
    }

    /// Waits for the end of a launcher.
    fn end(&mut self, index: usize) -> (ExitStatus, Duration) {
        let start = Instant::now();
        while start.elapsed() < PATIENCE {
            if let Some(status) = self.launchers[index].try_wait().unwrap() {
                return (status, start.elapsed());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("the launcher did not end;\n{}\n{}", self.stdout(), self.stderr());
    }

    fn assert_ends(&mut self, code: i32) -> Duration {
        let (status, time) = self.end(0);
        assert_eq!(status.code(), Some(code), "{status}\n{}\n{}", self.stdout(), self.stderr());
        time
    }

    fn assert_nothing_is_left(&self) {
        let alive: Vec<i32> = self.children().into_iter().filter(|id| is_alive(*id)).collect();
        assert_eq!((alive, self.run_directories()), (vec![], vec![]), "{}", self.stdout());
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        for launcher in &mut self.launchers {
            let _ = launcher.kill();
            let _ = launcher.wait();
        }
        let _ = fs::remove_dir_all(&self.directory);
    }
}

fn process_id(note: &Value) -> i32 {
    note["process_id"].as_i64().unwrap().try_into().unwrap()
}

fn is_alive(id: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
    // A zombie whose parent has not looked yet is dead.
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
}

#[test]
fn it_serves_and_ends_on_sigterm_with_nothing_left() {
    let mut stage = Stage::start("", "--num-shard 2");
    stage.until_serving();
    let generation = stage.generation(0);
    assert_eq!((&generation["number"], generation["ranks"].as_array().unwrap().len()), (&1.into(), 2));
    assert_eq!(stage.run_directories().len(), 1);
    assert!(stage.stdout().contains("rank 1: loading "), "{}", stage.stdout());
    stage.signal(Signal::SIGTERM);
    assert!(stage.assert_ends(0) < SOON);
    assert_eq!(stage.stderr(), "");
    stage.assert_nothing_is_left();
}

#[test]
fn sockets_are_for_this_user_alone() {
    use std::os::unix::fs::PermissionsExt;
    let stage = Stage::start("", "");
    stage.until_serving();
    let directory = &stage.run_directories()[0];
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(directory), 0o700);
    assert!(fs::metadata(directory.join("control")).unwrap().file_type().is_socket());
    assert_eq!(mode(&directory.join("control")), 0o600);
}

#[test]
fn ctrl_c_while_shards_load_ends_at_once_with_nothing_left() {
    let mut stage = Stage::start("shard-loads-slowly", "");
    stage.until_logged("rank 0: loading");
    stage.signal(Signal::SIGINT);
    assert!(stage.assert_ends(0) < SOON);
    stage.assert_nothing_is_left();
}

#[test]
fn ctrl_c_during_a_download_ends_at_once() {
    let mut stage = Stage::new();
    fs::remove_dir(stage.directory.join("model")).unwrap();
    stage.launch("download-hangs", "");
    stage.until_logged("downloading model");
    stage.signal(Signal::SIGINT);
    assert!(stage.assert_ends(0) < SOON);
    stage.assert_nothing_is_left();
}

#[test]
fn a_model_from_the_hub_is_served_from_where_it_was_downloaded_to() {
    let mut stage = Stage::new();
    fs::remove_dir(stage.directory.join("model")).unwrap();
    stage.launch("", "");
    stage.until_serving();
    assert!(stage.stdout().contains(&format!("model: {}", stage.directory.display())));
}

#[test]
fn a_shard_that_crashes_at_every_start_is_given_up_with_the_reason() {
    let mut stage = Stage::start("shard-crashes", "");
    assert!(stage.assert_ends(1) < Duration::from_secs(10));
    let message = stage.stderr();
    for part in ["3 times within 60 s", "SIGABRT", "something broke"] {
        assert!(message.contains(part), "{message}");
    }
    stage.assert_nothing_is_left();
}

#[test]
fn a_shard_that_refuses_the_model_is_not_asked_again() {
    let mut stage = Stage::start("shard-refuses", "--num-shard 2");
    assert!(stage.assert_ends(1) < SOON);
    assert!(stage.stderr().contains("could not load the model: tensor model.embed_tokens.weight is missing"));
    stage.assert_nothing_is_left();
}

#[test]
fn a_model_that_cannot_be_served_is_refused_before_any_rank_is_spawned() {
    let mut stage = Stage::start("plan-refuses", "");
    assert!(stage.assert_ends(1) < SOON);
    assert_eq!(
        stage.stderr(),
        "error: config.json: model_type is \"martian\"; expected one of llama, qwen2; choose another model\n"
    );
    assert!(!stage.stdout().contains("rank 0"));
    stage.assert_nothing_is_left();
}

#[test]
fn gpus_are_asked_for_before_anything_else_and_their_refusal_is_the_launchers() {
    let mut stage = Stage::new();
    fs::remove_dir(stage.directory.join("model")).unwrap();
    stage.launch("no-gpu download-hangs", "--device cuda");
    stage.assert_ends(1);
    assert_eq!(stage.stderr(), "error: --device cuda: the NVIDIA driver was not found; use --device cpu\n");
    assert!(!stage.stdout().contains("downloading"));
    stage.assert_nothing_is_left();
}

#[test]
fn a_shard_on_a_gpu_is_started_with_a_share_of_its_memory() {
    let mut stage = Stage::start("", "--device cuda");
    stage.until_serving();
    let log = stage.stdout();
    assert!(log.contains("GPU 0: Paper, 64.0 kB free"), "{log}");
    assert!(log.contains("memory of each for weights and cache: 57.6 kB"), "{log}");
    stage.signal(Signal::SIGTERM);
    stage.assert_ends(0);
}

#[test]
fn a_start_without_progress_ends_with_phase_and_stacks() {
    let mut stage = Stage::start("shard-stalls", "--num-shard 2 --startup-stall-timeout 1.5");
    assert!(stage.assert_ends(1) < SOON);
    assert!(stage.stderr().contains("no progress for 1.5 s"), "{}", stage.stderr());
    assert!(stage.stderr().contains("rank 0: loading 45 % of 13.6 MB, rank 1: loading 45 % of 13.6 MB"));
    for rank in [0, 1] {
        assert!(stage.stdout().contains(&format!("rank {rank} | stack of rank {rank}: load() in loading.py")));
    }
    stage.assert_nothing_is_left();
}

#[test]
fn a_port_in_use_is_named_before_anything_starts() {
    let mut stage = Stage::new();
    let _taken = TcpListener::bind(("127.0.0.1", stage.port)).unwrap();
    stage.launch("", "");
    assert!(stage.assert_ends(1) < SOON);
    assert!(stage.stderr().contains(&format!("--port {}", stage.port)) && stage.stderr().contains("in use"));
    stage.assert_nothing_is_left();
}

#[test]
fn a_second_launcher_on_the_same_port_leaves_the_first_alone() {
    let mut stage = Stage::start("", "");
    stage.until_serving();
    let second = stage.launch("", "");
    assert_eq!(stage.end(second).0.code(), Some(1));
    assert_eq!(stage.run_directories().len(), 1);
    assert!(stage.children().into_iter().all(is_alive));
}

#[test]
fn wrong_arguments_end_with_code_2_and_the_name_of_the_flag() {
    for (flags, name) in [
        ("--max-concurrent-requests abc", "--max-concurrent-requests"),
        ("--max-input-tokens 10 --max-total-tokens 5", "--max-input-tokens 10"),
        ("--quantize int7", "--quantize"),
        ("--log-level ,=", "--log-level"),
        ("--log-level warning", "\"warning\" has no level"),
        ("--otlp-endpoint collector:4317", "expected http://HOST:PORT"),
        ("--otlp-endpoint https://collector:4317", "https is not spoken"),
        ("--max-batch-total-tokens 10", "--block-size 16 must not exceed --max-batch-total-tokens 10"),
        ("--no-such-flag", "--no-such-flag"),
    ] {
        let mut stage = Stage::start("", flags);
        stage.assert_ends(2);
        assert!(stage.stderr().contains(name), "{}", stage.stderr());
    }
}

#[test]
fn a_variable_for_a_flag_that_is_not_served_is_the_same_error() {
    let launcher = env!("CARGO_BIN_EXE_text-generation-launcher");
    for (variable, value) in [("LORA_ADAPTERS", "secret"), ("MAX_CONCURRENT_REQUESTS", "-1")] {
        let output = Command::new(launcher).args(["--model-id", "m"]).env(variable, value).output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        assert!(stderr.to_uppercase().replace('-', "_").contains(variable), "{stderr}");
        assert!(!stderr.contains("secret"), "{stderr}");
    }
}

#[test]
fn a_killed_shard_alone_is_replaced_and_the_next_generation_announced() {
    let stage = Stage::start("router-steps", "--num-shard 2");
    stage.until_serving();
    let before = stage.generation(0);
    kill(Pid::from_raw(process_id(&before["ranks"][1])), Signal::SIGKILL).unwrap();
    let after = stage.generation(1);
    assert_eq!((&after["number"], &after["ranks"][0]), (&2.into(), &before["ranks"][0]));
    assert_eq!(after["ranks"][1]["incarnation"], 2);
    assert_ne!(after["ranks"][1]["process_id"], before["ranks"][1]["process_id"]);
    assert_ne!(after["rendezvous"], before["rendezvous"]);
    let lost = &stage.notes("lost")[0];
    assert_eq!(lost["number"], 1);
    assert!(lost["reason"].as_str().unwrap().contains("SIGKILL"));
    assert_eq!(stage.notes("router").len(), 1, "the router lives on");
}

#[test]
fn a_stopped_shard_is_killed_and_replaced_within_ten_seconds() {
    let stage = Stage::start("router-steps", "--num-shard 2");
    stage.until_serving();
    let stopped = process_id(&stage.generation(0)["ranks"][0]);
    let start = Instant::now();
    kill(Pid::from_raw(stopped), Signal::SIGSTOP).unwrap();
    stage.until("a loss", |stage| stage.notes("lost").first().cloned());
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    let after = stage.generation(1);
    assert_eq!((&after["ranks"][0]["incarnation"], &after["ranks"][1]["incarnation"]), (&2.into(), &1.into()));
    assert!(!is_alive(stopped));
}

#[test]
fn a_killed_router_is_restarted_and_told_the_present_generation() {
    let stage = Stage::start("", "--num-shard 2");
    stage.until_serving();
    let router = process_id(&stage.notes("router")[0]);
    kill(Pid::from_raw(router), Signal::SIGKILL).unwrap();
    assert_eq!(stage.generation(1), stage.generation(0));
    assert_eq!(stage.notes("router").len(), 2);
}

#[test]
fn a_stopped_router_is_killed_and_replaced_within_ten_seconds() {
    let stage = Stage::start("router-steps", "--num-shard 2");
    stage.until_serving();
    let router = process_id(&stage.notes("router")[0]);
    let start = Instant::now();
    kill(Pid::from_raw(router), Signal::SIGSTOP).unwrap();
    assert_eq!(stage.generation(1), stage.generation(0), "its successor is told the same");
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    assert_eq!(stage.notes("router").len(), 2);
    assert!(!is_alive(router));
    assert!(stage.stdout().contains("router hung: no answer for "), "{}", stage.stdout());
}

#[test]
fn a_router_that_crashes_at_every_start_is_given_up_with_the_reason() {
    let mut stage = Stage::start("router-crashes", "");
    stage.assert_ends(1);
    for part in ["the router was lost 3 times", "exit code 3", "the router broke"] {
        assert!(stage.stderr().contains(part), "{}", stage.stderr());
    }
    stage.assert_nothing_is_left();
}

#[test]
fn a_router_that_cannot_serve_ends_everything_with_its_reason() {
    let mut stage = Stage::start("router-cannot-serve", "");
    stage.assert_ends(1);
    assert_eq!(stage.stderr(), "error: no block fits into the memory\n");
    assert_eq!(stage.notes("gave_up").len(), 1);
    stage.assert_nothing_is_left();
}

#[test]
fn requests_that_do_not_finish_are_cut_off_after_the_grace() {
    let mut stage = Stage::start("router-drains-for-ever", "-g 1");
    stage.until_serving();
    stage.signal(Signal::SIGTERM);
    let time = stage.assert_ends(0);
    assert!(time > Duration::from_millis(900) && time < SOON, "{time:?}");
    stage.assert_nothing_is_left();
}

#[test]
fn a_second_ctrl_c_ends_everything_within_seconds() {
    let mut stage = Stage::start("router-drains-for-ever", "");
    stage.until_serving();
    stage.signal(Signal::SIGINT);
    stage.until_logged("running requests are given 90 s");
    stage.signal(Signal::SIGINT);
    assert!(stage.assert_ends(0) < SOON);
    stage.assert_nothing_is_left();
}

#[test]
fn when_the_launcher_is_killed_deaf_children_and_the_run_directory_go_too() {
    for fake in ["", "deaf"] {
        let mut stage = Stage::start(fake, "--num-shard 2");
        stage.until_serving();
        let children = stage.children();
        assert_eq!(children.len(), 3);
        stage.signal(Signal::SIGKILL);
        assert_eq!(stage.end(0).0.signal(), Some(9));
        let start = Instant::now();
        stage.until("the end of everything", |stage| {
            (!children.iter().any(|id| is_alive(*id)) && stage.run_directories().is_empty()).then_some(())
        });
        assert!(start.elapsed() < SOON, "{:?}", start.elapsed());
        let again = stage.launch("", "");
        stage.until("a second start", |stage| {
            stage.text(&format!("stdout-{again}")).contains("Connected").then_some(())
        });
    }
}

#[test]
fn a_shard_that_floods_is_neither_blocked_nor_kept_in_memory() {
    let stage = Stage::start("shard-floods", "");
    stage.until_serving();
    let status = format!("/proc/{}/status", stage.launchers[0].id());
    let peak_kib = || {
        let status = fs::read_to_string(&status).unwrap();
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        // A process that has ended has no memory.
        let peak = peak.unwrap_or_else(|| panic!("the launcher ended: {}\n{status}", stage.stderr()));
        peak.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap()
    };
    let before = peak_kib();
    stage.until("the end of the flood", |stage| stage.directory.join("flooded").exists().then_some(()));
    let growth = peak_kib() - before;
    assert!(growth < 8 * 1024, "{growth} KiB");
    assert_eq!(stage.notes("lost").len(), 0);
    assert!(stage.stdout().contains("more bytes]"));
}

#[test]
fn logs_are_lines_of_json_where_asked() {
    let mut stage = Stage::start("plan-refuses", "--json-output");
    stage.assert_ends(1);
    let stdout = stage.stdout();
    let lines: Vec<Value> = stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(lines.last().unwrap()["message"].as_str().unwrap().contains("martian"));
    assert_eq!(stage.stderr(), "");

    let stage = Stage::start("router-steps", "--json-output --num-shard 2");
    stage.until_serving();
    kill(Pid::from_raw(process_id(&stage.generation(0)["ranks"][1])), Signal::SIGUSR1).unwrap();
    stage.until_logged("stack of rank 1");
    for line in stage.stdout().lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        for field in ["timestamp", "level", "process", "message"] {
            assert!(line[field].is_string(), "{field} of {line}");
        }
        assert!(line.as_object().unwrap().values().all(|value| !value.is_object()), "{line}");
    }
}

#[test]
fn a_reaper_that_is_killed_is_replaced_and_knows_the_children() {
    let mut stage = Stage::start("deaf", "--num-shard 2");
    stage.until_serving();
    let reaper = |stage: &Stage| {
        let launcher = stage.launchers[0].id();
        let children = fs::read_to_string(format!("/proc/{launcher}/task/{launcher}/children")).unwrap();
        let children: Vec<i32> = children.split_whitespace().map(|id| id.parse().unwrap()).collect();
        let is_reaper = |id: &i32| {
            let command = fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
            is_alive(*id) && command.split(|byte| *byte == 0).nth(1) == Some(b"reap")
        };
        children.into_iter().find(is_reaper)
    };
    let first = reaper(&stage).unwrap();
    kill(Pid::from_raw(first), Signal::SIGKILL).unwrap();
    let second = stage.until("another reaper", |stage| reaper(stage).filter(|second| *second != first));
    stage.until_logged("the reaper was ended by SIGKILL");
    assert!(is_alive(second));
    let children = stage.children();
    stage.signal(Signal::SIGKILL);
    stage.end(0);
    stage.until("the end of everything", |stage| {
        (!children.iter().any(|id| is_alive(*id)) && stage.run_directories().is_empty()).then_some(())
    });
}

#[test]
fn a_router_that_can_never_work_ends_the_launcher_at_once_with_one_message() {
    let mut stage = Stage::start("router-is-hopeless", "");
    assert!(stage.assert_ends(1) < SOON);
    let all = stage.stdout() + &stage.stderr();
    assert_eq!(stage.stderr(), "error: the router cannot serve: tokenizer.json: is missing\n");
    let told: Vec<&str> = all.lines().filter(|line| line.contains("tokenizer.json")).collect();
    assert_eq!(told.len(), 2, "the router's own line and the last word: {told:?}");
    stage.assert_nothing_is_left();
}

#[test]
fn what_a_download_refuses_is_said_once() {
    let mut stage = Stage::new();
    fs::remove_dir(stage.directory.join("model")).unwrap();
    stage.launch("download-refuses", "");
    stage.assert_ends(1);
    assert_eq!(stage.stderr(), "error: the cache has no room\n");
    assert!(stage.stdout().contains("download | Fetching 7 files") && !stage.stdout().contains("no room"));
    stage.assert_nothing_is_left();
}

#[test]
fn what_the_router_refuses_to_read_ends_the_launcher_before_anything_is_started() {
    let mut stage = Stage::start("router-refuses", "");
    stage.assert_ends(1);
    assert_eq!(stage.stderr(), "error: --chat-template none: cannot be read\n");
    assert!(!stage.stdout().contains("rank 0"), "{}", stage.stdout());
    stage.assert_nothing_is_left();
}

#[test]
fn a_revision_of_a_local_folder_has_no_effect_and_the_log_says_so() {
    let mut stage = Stage::start("plan-refuses", "--revision v1");
    stage.assert_ends(1);
    let told = stage.stdout().lines().filter(|line| line.contains("--revision v1 has no effect")).count();
    assert_eq!(told, 1, "{}", stage.stdout());
}
