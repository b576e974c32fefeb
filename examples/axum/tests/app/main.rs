//! Tests the example with clients of other projects, with restarts under load, with layers of other
//! crates around its requests, and under every fault of a connection.

#[path = "../../src/app.rs"]
mod app;
mod clients;
mod faults;
mod layers;
mod restarts;

use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};
use tokio::time::timeout;

/// The time limit of each wait, far longer than any wait takes.
const NET: Duration = Duration::from_secs(60);

async fn soon<F: Future>(what: &str, future: F) -> F::Output {
    match timeout(NET, future).await {
        Ok(done) => done,
        Err(_elapsed) => panic!("{what}: not within {NET:?}"),
    }
}

/// A running example. Dropping it kills the process.
struct Example {
    child: Child,
    stdout: Lines<BufReader<ChildStdout>>,
    address: String,
    /// The path of its certificate, if it has one.
    cert: Option<String>,
}

impl Example {
    async fn start(args: &[&str]) -> Self {
        Self::start_at("127.0.0.1:0", args).await
    }

    async fn start_at(address: &str, args: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_axum-on-tower-tcp"))
            .args(["--listen", address])
            .args(args)
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("it starts");
        let stdout = child.stdout.take().expect("stdout is a pipe");
        let mut stdout = BufReader::new(stdout).lines();
        let mut cert = None;
        let address = loop {
            let line = soon("its address", stdout.next_line()).await;
            let line = line.expect("stdout is text").expect("it listens");
            if let Some(path) = line.strip_prefix("the certificate is in ") {
                cert = Some(path.to_owned());
            } else if let Some(address) = line.strip_prefix("listening on ") {
                break address.to_owned();
            }
        };
        Self {
            child,
            stdout,
            address,
            cert,
        }
    }

    fn terminate(&self) {
        let pid = self.child.id().expect("it was not waited for");
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
        kill_process(pid.expect("a process"), Signal::TERM).expect("it is ours");
    }

    /// Waits until the process exits. Returns the last line that it printed.
    async fn ended(mut self) -> (ExitStatus, String) {
        let mut last = String::new();
        while let Some(line) = soon("a line", self.stdout.next_line()).await.expect("text") {
            last = line;
        }
        let status = soon("its end", self.child.wait()).await;
        (status.expect("it is ours"), last)
    }
}
