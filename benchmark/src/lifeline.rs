//! How a process that serves comes to its end: never later than asked, and never later than who started it.

use std::io::Read;
use std::time::Duration;

/// When to end. Ctrl-C and SIGTERM end it in any case.
#[derive(Clone, Debug, clap::Args)]
pub struct Lifeline {
    /// Ends when standard input does: with whoever started this process.
    #[arg(long)]
    pub exit_with_stdin: bool,
    /// Ends after this many seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 3600.0)]
    pub exit_after: f64,
}

impl Lifeline {
    /// Returns when it is time to end.
    pub async fn ended(&self) {
        let terminate = async {
            match tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
                Ok(mut signal) => drop(signal.recv().await),
                Err(_) => std::future::pending().await,
            }
        };
        let stdin = async {
            if !self.exit_with_stdin {
                std::future::pending::<()>().await;
            }
            wait_for_end_of_stdin().await;
        };
        tokio::select! {
            _ = tokio::signal::ctrl_c() => {}
            () = terminate => {}
            () = stdin => {}
            () = tokio::time::sleep(Duration::from_secs_f64(self.exit_after)) => {}
        }
    }
}

/// Reads on a thread of its own that nobody waits for: a read of standard input cannot be cancelled.
async fn wait_for_end_of_stdin() {
    let (ended, wait) = tokio::sync::oneshot::channel::<()>();
    std::thread::spawn(move || {
        let mut buffer = [0; 256];
        while std::io::stdin().read(&mut buffer).is_ok_and(|read| read > 0) {}
        drop(ended);
    });
    let _ = wait.await;
}
