//! Runs `openssl s_client`.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::net::SocketAddr;
use std::process::Stdio;

use tokio::io::BufReader;
use tokio::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command};

/// A running `openssl s_client`.
pub(crate) struct Openssl {
    pub(crate) stdin: ChildStdin,
    pub(crate) stdout: BufReader<ChildStdout>,
    pub(crate) stderr: ChildStderr,
    /// Ends when it is dropped.
    pub(crate) process: Child,
}

impl Openssl {
    /// Connects. Without `-quiet`, openssl takes some input lines for its own commands.
    pub(crate) fn connect(to: SocketAddr, args: &[&str]) -> Self {
        let mut process = Command::new("openssl")
            .args(["s_client", "-connect", &to.to_string()])
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("openssl is installed (see .ci/run)");
        Self {
            stdin: process.stdin.take().expect("stdin is a pipe"),
            stdout: BufReader::new(process.stdout.take().expect("stdout is a pipe")),
            stderr: process.stderr.take().expect("stderr is a pipe"),
            process,
        }
    }
}
