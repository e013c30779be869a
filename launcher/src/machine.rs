//! What this machine offers: cores, memory, a free port. Reads files below a root, so that tests can bring their own.

use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};

/// What the shards may use.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Machine {
    /// Cores by affinity and cgroup quota, at least one.
    pub cores: u32,
    /// The smaller of the available memory and every cgroup's limit, in bytes.
    pub memory_bytes: u64,
    /// Processes and threads that may be started beside those that run, by every cgroup's limit. `None`: as many as you like.
    pub tasks: Option<u64>,
    /// The processor, for people.
    pub processor: String,
}

impl Machine {
    /// Reads `proc` and `sys/fs/cgroup` below `root` (`/`, except in tests).
    ///
    /// # Errors
    ///
    /// When the available memory cannot be read: every plan needs it.
    pub fn read(root: &Path) -> io::Result<Self> {
        let affinity = read(&root.join("proc/self/status")).and_then(|text| affinity(&text));
        let cores = affinity.or_else(online_cores).unwrap_or(1);
        let quota = cgroup_files(root, "cpu").iter().filter_map(|group| group.cpu_quota()).fold(f64::MAX, f64::min);
        let meminfo = fs::read_to_string(root.join("proc/meminfo"))?;
        let available = available_bytes(&meminfo)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "/proc/meminfo names no MemAvailable"))?;
        let limits = cgroup_files(root, "memory").into_iter().filter_map(|group| group.memory_limit());
        Ok(Self {
            cores: (cores.min(quota as u32)).max(1),
            memory_bytes: limits.fold(available, u64::min),
            tasks: cgroup_files(root, "pids").iter().filter_map(Cgroup::tasks_left).min(),
            processor: read(&root.join("proc/cpuinfo")).map_or_else(|| "unknown".into(), |text| processor(&text)),
        })
    }
}

fn online_cores() -> Option<u32> {
    std::thread::available_parallelism().ok().and_then(|cores| u32::try_from(cores.get()).ok())
}

fn read(path: &Path) -> Option<String> {
    fs::read_to_string(path).ok()
}

/// Cores in `Cpus_allowed_list: 0-3,8,10-11` of `/proc/self/status`.
fn affinity(status: &str) -> Option<u32> {
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    list.trim().split(',').try_fold(0, |cores, range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last) = (first.parse::<u32>().ok()?, last.parse::<u32>().ok()?);
        Some(cores + last.checked_sub(first)? + 1)
    })
}

/// Bytes in `MemAvailable: 1234 kB` of `/proc/meminfo`.
fn available_bytes(meminfo: &str) -> Option<u64> {
    let value = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

fn processor(cpuinfo: &str) -> String {
    let field = |name: &str| {
        cpuinfo.lines().find_map(|line| line.strip_prefix(name)?.trim_start().strip_prefix(':')).map(str::trim)
    };
    let flags: Vec<&str> = field("flags").unwrap_or("").split(' ').collect();
    let interesting = ["avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8"];
    let has: Vec<&str> = interesting.into_iter().filter(|flag| flags.contains(flag)).collect();
    format!("{} ({})", field("model name").unwrap_or("unknown"), has.join(" "))
}

/// A directory of one cgroup: its own, or that of an ancestor.
struct Cgroup {
    directory: PathBuf,
}

impl Cgroup {
    fn number<T: std::str::FromStr>(&self, file: &str) -> Option<T> {
        read(&self.directory.join(file))?.trim().parse().ok()
    }

    /// Cores' worth of time: version 2's `cpu.max`, or version 1's pair of files.
    fn cpu_quota(&self) -> Option<f64> {
        if let Some(text) = read(&self.directory.join("cpu.max")) {
            let (quota, period) = text.trim().split_once(' ')?;
            return ratio(quota.parse().ok()?, period.parse().ok()?);
        }
        // Version 1 writes -1 for no quota.
        let quota = self.number::<i64>("cpu.cfs_quota_us").and_then(|quota| u64::try_from(quota).ok())?;
        ratio(quota, self.number("cpu.cfs_period_us")?)
    }

    /// Bytes: version 2's `memory.max` (not a number where unlimited), or version 1's file (huge where unlimited).
    fn memory_limit(&self) -> Option<u64> {
        self.number("memory.max").or_else(|| self.number("memory.limit_in_bytes"))
    }

    /// Processes and threads, in the same files of both versions (not a number where unlimited).
    fn tasks_left(&self) -> Option<u64> {
        Some(self.number::<u64>("pids.max")?.saturating_sub(self.number("pids.current")?))
    }
}

fn ratio(quota: u64, period: u64) -> Option<f64> {
    (period > 0).then(|| quota as f64 / period as f64)
}

/// Directories whose files limit this process: for both cgroup versions, its own group and all ancestors.
fn cgroup_files(root: &Path, controller: &str) -> Vec<Cgroup> {
    let mount = root.join("sys/fs/cgroup");
    let groups = read(&root.join("proc/self/cgroup")).unwrap_or_default();
    let mut directories = Vec::new();
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
        let mounts = if controllers.is_empty() {
            vec![mount.clone(), mount.join("unified")]
        } else if controllers.split(',').any(|name| name == controller) {
            vec![mount.join(controller), mount.join(controllers)]
        } else {
            continue;
        };
        // Inside a container the path may be that of the host: the ancestors up to the mount exist all the same.
        for mount in mounts {
            let own = Path::new(path.trim_start_matches('/'));
            directories.extend(own.ancestors().map(|ancestor| Cgroup { directory: mount.join(ancestor) }));
        }
    }
    directories
}

/// Tries to listen on `address` for a moment.
///
/// # Errors
///
/// Why not: the port is taken, reserved for root, or the address is none of this machine's.
pub fn try_listen(address: SocketAddr) -> io::Result<()> {
    TcpListener::bind(address).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A root directory with the given files, removed on drop.
    struct Root(PathBuf);

    impl Root {
        fn with(name: &str, files: &[(&str, &str)]) -> Self {
            let root = std::env::temp_dir().join(format!("launcher-machine-{name}-{}", std::process::id()));
            for (path, text) in files {
                let path = root.join(path);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, text).unwrap();
            }
            Self(root)
        }

        fn read(&self) -> (u32, u64) {
            let machine = Machine::read(&self.0).unwrap();
            (machine.cores, machine.memory_bytes)
        }
    }

    impl Drop for Root {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).unwrap();
        }
    }

    const MEMINFO: (&str, &str) = ("proc/meminfo", "MemTotal: 64 kB\nMemAvailable:   1000 kB\nCached: 1 kB\n");
    const STATUS: (&str, &str) = ("proc/self/status", "Name:\tx\nCpus_allowed_list:\t0-3,8,10-11\n");

    #[test]
    fn without_cgroups_affinity_and_available_memory_count() {
        assert_eq!(Root::with("bare", &[MEMINFO, STATUS]).read(), (7, 1_024_000));
    }

    #[test]
    fn the_smallest_limit_of_a_version_2_group_and_its_ancestors_counts() {
        let root = Root::with(
            "v2",
            &[
                MEMINFO,
                STATUS,
                ("proc/self/cgroup", "0::/kubepods/pod1\n"),
                ("sys/fs/cgroup/kubepods/pod1/cpu.max", "max 100000\n"),
                ("sys/fs/cgroup/kubepods/pod1/memory.max", "500000\n"),
                ("sys/fs/cgroup/kubepods/cpu.max", "250000 100000\n"),
                ("sys/fs/cgroup/kubepods/memory.max", "max\n"),
            ],
        );
        assert_eq!(root.read(), (2, 500_000));
    }

    #[test]
    fn version_1_limits_count_and_its_unlimited_values_do_not() {
        let files = [
            MEMINFO,
            STATUS,
            ("proc/self/cgroup", "4:memory:/docker/abc\n1:cpu,cpuacct:/docker/abc\n"),
            ("sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes", "300000\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
            ("sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_quota_us", "-1\n"),
            ("sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_period_us", "100000\n"),
        ];
        assert_eq!(Root::with("v1", &files).read(), (7, 300_000));
    }

    #[test]
    fn what_a_group_or_its_ancestor_lets_start_is_what_its_limit_leaves() {
        let files = [
            MEMINFO,
            STATUS,
            ("proc/self/cgroup", "8:pids:/docker/abc\n0::/kubepods/pod1\n"),
            ("sys/fs/cgroup/pids/docker/abc/pids.max", "100\n"),
            ("sys/fs/cgroup/pids/docker/abc/pids.current", "30\n"),
            ("sys/fs/cgroup/pids/docker/pids.max", "max\n"),
            ("sys/fs/cgroup/pids/docker/pids.current", "500\n"),
            ("sys/fs/cgroup/kubepods/pids.max", "40\n"),
            ("sys/fs/cgroup/kubepods/pids.current", "7\n"),
        ];
        assert_eq!(Machine::read(&Root::with("tasks", &files).0).unwrap().tasks, Some(33));
        assert_eq!(Machine::read(&Root::with("no-tasks", &files[..2]).0).unwrap().tasks, None);
    }

    #[test]
    fn a_container_that_sees_the_path_of_its_host_still_finds_its_limit_at_the_mount() {
        let root = Root::with(
            "mounted",
            &[
                MEMINFO,
                STATUS,
                ("proc/self/cgroup", "4:memory:/host/path\n1:cpu:/host/path\n"),
                ("sys/fs/cgroup/memory/memory.limit_in_bytes", "200000\n"),
                ("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "50000\n"),
                ("sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n"),
            ],
        );
        assert_eq!(root.read(), (1, 200_000));
    }

    #[test]
    fn a_machine_without_readable_memory_is_an_error() {
        let root = Root::with("broken", &[("proc/meminfo", "nonsense\n")]);
        assert!(Machine::read(&root.0).unwrap_err().to_string().contains("MemAvailable"));
    }

    #[test]
    fn a_taken_port_is_noticed() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        assert_eq!(try_listen(taken.local_addr().unwrap()).unwrap_err().kind(), io::ErrorKind::AddrInUse);
    }
}
