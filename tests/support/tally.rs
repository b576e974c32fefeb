//! Clients that count their requests.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// The requests of many clients.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) sent: AtomicUsize,
    pub(crate) answered: AtomicUsize,
    /// Sent, and not answered.
    pub(crate) lost: AtomicUsize,
    pub(crate) refused: AtomicUsize,
    /// Connections that the server closed before a request was sent.
    pub(crate) closed: AtomicUsize,
}

impl Tally {
    /// Sends `requests` in all, and up to `each` on a connection.
    async fn client(self: Arc<Self>, server: SocketAddr, requests: usize, each: usize) {
        loop {
            if self.answered.load(SeqCst) + self.lost.load(SeqCst) >= requests {
                return;
            }
            let Ok(stream) = TcpStream::connect(server).await else {
                self.refused.fetch_add(1, SeqCst);
                sleep(Duration::from_millis(1)).await;
                continue;
            };
            stream.set_nodelay(true).unwrap();
            let mut stream = BufReader::new(stream);
            for _ in 0..each {
                // An end that has arrived by now is seen before anything is sent.
                match stream.get_ref().try_read(&mut [0]) {
                    Err(err) if err.kind() == ErrorKind::WouldBlock => {}
                    _ => {
                        self.closed.fetch_add(1, SeqCst);
                        break;
                    }
                }
                let number = self.sent.fetch_add(1, SeqCst);
                if number >= requests {
                    self.sent.fetch_sub(1, SeqCst);
                    return;
                }
                let request = format!("r{number}\n");
                if stream.write_all(request.as_bytes()).await.is_err() {
                    self.sent.fetch_sub(1, SeqCst);
                    self.closed.fetch_add(1, SeqCst);
                    break;
                }
                let mut reply = String::new();
                let read = timeout(Duration::from_secs(20), stream.read_line(&mut reply)).await;
                if !matches!(read, Ok(Ok(_))) || reply != request {
                    self.lost.fetch_add(1, SeqCst);
                    break;
                }
                self.answered.fetch_add(1, SeqCst);
            }
        }
    }

    /// Starts 32 clients.
    pub(crate) fn start(
        server: SocketAddr,
        requests: usize,
        each: usize,
    ) -> (Arc<Self>, JoinSet<()>) {
        let tally = Arc::new(Self::default());
        let clients = (0..32).map(|_| Arc::clone(&tally).client(server, requests, each));
        let clients = clients.collect();
        (tally, clients)
    }

    /// Waits until so many requests were sent.
    pub(crate) async fn reached(&self, sent: usize) {
        while self.sent.load(SeqCst) < sent {
            sleep(Duration::from_millis(1)).await;
        }
    }

    pub(crate) fn none_lost(&self) {
        assert_eq!(self.lost.load(SeqCst), 0, "{self:?}");
        assert_eq!(self.refused.load(SeqCst), 0, "{self:?}");
    }
}
