//! The run directory: fresh for each start, for the eyes of this user alone; sockets and rendezvous files live in it.
//!
//! A lock on a file inside tells a living launcher's directory from one left behind by a launcher that died.

use std::fs::{self, DirBuilder, File, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// The longest path that fits into the address of a Unix socket, in bytes, without the closing zero.
const MAX_SOCKET_PATH: usize = 107;
/// What is written there, at most: by ranks that meet.
const NEEDED_BYTES: usize = 64 << 10;
/// Room for the longest name of a socket: `rank-255-4294967295`.
const LONGEST_NAME: usize = 20;

/// An open run directory. Dropping it removes it.
#[derive(Debug)]
pub struct RunDirectory {
    path: PathBuf,
    /// Held, never read: the lock ends with the process, however that ends.
    _lock: File,
}

impl RunDirectory {
    /// Makes `<prefix>-<process id>-<suffix>` with mode 0700.
    ///
    /// # Errors
    ///
    /// When socket paths would not fit, or the directory cannot be made, or has no room for what is written there.
    pub fn create(prefix: &str) -> io::Result<Self> {
        let suffix = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.subsec_nanos());
        let path = std::path::absolute(format!("{prefix}-{}-{suffix:08x}", std::process::id()))?;
        let longest = path.as_os_str().len() + 1 + LONGEST_NAME;
        if longest > MAX_SOCKET_PATH {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "--shard-uds-path {prefix:?} is too long: the paths of the sockets would have {longest} bytes, a \
                     Unix socket allows {MAX_SOCKET_PATH}; choose a prefix shorter by {} bytes",
                    longest - MAX_SOCKET_PATH
                ),
            ));
        }
        DirBuilder::new().mode(0o700).create(&path)?;
        let made = lock_in(&path).and_then(|lock| has_room(&path).map(|()| lock));
        if made.is_err() {
            let _ = fs::remove_dir_all(&path);
        }
        made.map(|lock| Self { _lock: lock, path })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the router finds the launcher.
    pub fn control_socket(&self) -> PathBuf {
        self.path.join("control")
    }

    /// Where an operator finds the router.
    pub fn admin_socket(&self) -> PathBuf {
        self.path.join("admin")
    }

    /// Where the router finds a shard; a replacement listens somewhere else than its predecessor.
    pub fn shard_socket(&self, rank: u32, incarnation: u32) -> PathBuf {
        self.path.join(format!("rank-{rank}-{incarnation}"))
    }

    /// Through which the ranks of a generation find each other.
    pub fn rendezvous(&self, generation: u64) -> PathBuf {
        self.path.join(format!("rendezvous-{generation}"))
    }
}

impl Drop for RunDirectory {
    fn drop(&mut self) {
        // A second remover (the reaper) may have been faster.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// The lock file gets its name only once it is locked, so that a sweep never sees it unlocked.
fn lock_in(directory: &Path) -> io::Result<File> {
    let unlocked = directory.join("lock.new");
    let file = File::create_new(&unlocked)?;
    file.set_permissions(Permissions::from_mode(0o600))?;
    file.lock()?;
    fs::rename(unlocked, directory.join("lock"))?;
    Ok(file)
}

/// Asks now, by writing, rather than have the ranks fail when they meet.
fn has_room(directory: &Path) -> io::Result<()> {
    let probe = directory.join("room");
    fs::write(&probe, vec![0; NEEDED_BYTES])?;
    fs::remove_file(probe)
}

/// Removes the directories that dead launchers of the same user left under this prefix, and says which.
pub fn sweep(prefix: &str) -> Vec<PathBuf> {
    let Ok(prefix) = std::path::absolute(prefix) else { return Vec::new() };
    let (Some(parent), Some(name)) = (prefix.parent(), prefix.file_name().and_then(|name| name.to_str())) else {
        return Vec::new();
    };
    let Ok(entries) = fs::read_dir(parent) else { return Vec::new() };
    entries
        .filter_map(Result::ok)
        .filter(|entry| entry.file_name().to_str().is_some_and(|found| is_ours(found, name)))
        .map(|entry| entry.path())
        .filter(|path| is_abandoned(path) && fs::remove_dir_all(path).is_ok())
        .collect()
}

/// Whether the name is `<prefix>-<process id>-<8 hexadecimal digits>`.
fn is_ours(name: &str, prefix: &str) -> bool {
    let Some((process_id, suffix)) =
        name.strip_prefix(prefix).and_then(|rest| rest.strip_prefix('-')).and_then(|rest| rest.split_once('-'))
    else {
        return false;
    };
    process_id.parse::<u32>().is_ok() && suffix.len() == 8 && suffix.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn is_abandoned(path: &Path) -> bool {
    let Ok(metadata) = fs::symlink_metadata(path) else { return false };
    metadata.is_dir()
        && metadata.uid() == nix::unistd::geteuid().as_raw()
        && File::open(path.join("lock")).is_ok_and(|lock| lock.try_lock().is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefix(name: &str) -> String {
        std::env::temp_dir().join(format!("launcher-test-{name}-{}", std::process::id())).to_str().unwrap().into()
    }

    #[test]
    fn a_run_directory_is_private_and_goes_with_its_owner() {
        let directory = RunDirectory::create(&prefix("private")).unwrap();
        let path = directory.path().to_owned();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o700);
        drop(directory);
        assert!(!path.exists());
    }

    #[test]
    fn a_sweep_removes_what_the_dead_left_and_spares_the_living() {
        let prefix = prefix("sweep");
        let living = RunDirectory::create(&prefix).unwrap();
        let dead = PathBuf::from(format!("{prefix}-1-00000000"));
        let stranger = PathBuf::from(format!("{prefix}-backup"));
        for path in [&dead, &stranger] {
            fs::create_dir(path).unwrap();
            fs::write(path.join("lock"), "").unwrap();
        }
        assert_eq!(sweep(&prefix), std::slice::from_ref(&dead));
        assert!(living.path().exists() && stranger.exists() && !dead.exists());
        fs::remove_dir_all(stranger).unwrap();
    }

    #[test]
    fn a_prefix_too_long_for_sockets_is_refused() {
        let error = RunDirectory::create(&format!("/tmp/{}", "x".repeat(90))).unwrap_err().to_string();
        assert!(error.contains("--shard-uds-path") && error.contains("107"), "{error}");
    }

    #[test]
    fn the_longest_socket_name_fits() {
        let directory = RunDirectory::create(&prefix("names")).unwrap();
        let socket = directory.shard_socket(255, u32::MAX);
        assert!(socket.file_name().unwrap().len() <= LONGEST_NAME);
    }
}
