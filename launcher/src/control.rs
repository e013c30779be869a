//! The launcher's end of the control socket: lines of JSON from and to the router. One router at a time; a new
//! connection replaces the old one, whose router is gone or should be.

use std::fs::Permissions;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use text_generation_router::control::{ToLauncher, ToRouter};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixListener;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::events::Event;

/// The longest message, in bytes.
const MAX_MESSAGE: u64 = 64 * 1024;
/// A router that does not take a message within this is no longer written to.
const DEADLINE: Duration = Duration::from_secs(1);

/// Opens the socket, for this user alone.
///
/// # Errors
///
/// When the path cannot be bound.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Serves the socket until nobody takes the events.
pub async fn serve(listener: UnixListener, mut messages: mpsc::Receiver<ToRouter>, events: mpsc::Sender<Event>) {
    let mut connection: Option<(OwnedWriteHalf, JoinHandle<()>)> = None;
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((stream, _)) = accepted else { continue };
                let (reader, writer) = stream.into_split();
                if let Some((_, old)) = connection.take() {
                    old.abort();
                }
                if events.send(Event::RouterConnected).await.is_err() {
                    return;
                }
                connection = Some((writer, tokio::spawn(read(reader, events.clone()))));
            }
            message = messages.recv() => {
                let Some(message) = message else { return };
                let Some((writer, _)) = &mut connection else { continue };
                if let Err(error) = write(writer, &message).await {
                    tracing::warn!("the router does not take messages: {error}");
                    connection = None;
                }
            }
        }
    }
}

async fn write(writer: &mut OwnedWriteHalf, message: &ToRouter) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    tokio::time::timeout(DEADLINE, writer.write_all(&line)).await?
}

async fn read(reader: OwnedReadHalf, events: mpsc::Sender<Event>) {
    let mut reader = BufReader::new(reader);
    loop {
        let mut line = Vec::new();
        match (&mut reader).take(MAX_MESSAGE).read_until(b'\n', &mut line).await {
            Ok(1..) => {}
            Ok(0) | Err(_) => return,
        }
        match serde_json::from_slice::<ToLauncher>(&line) {
            Ok(message) => {
                if events.send(Event::RouterSaid(message)).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                tracing::warn!(
                    "the router said something that is no message ({error}): are all programs of the same version?"
                );
            }
        }
    }
}
