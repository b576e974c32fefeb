//! The `tail` example: every client receives every byte at its own pace, and a slow client delays
//! no other.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::PathBuf;

use process::{Client, Example, soon};
use tempfile::TempDir;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpSocket, TcpStream};

#[path = "support/process.rs"]
mod process;

/// A growing file in a directory of its own.
struct Growing {
    dir: TempDir,
    file: File,
}

impl Growing {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory can be made");
        let file = open(dir.path().join("log"));
        Self { dir, file }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("log")
    }

    fn append(&mut self, bytes: impl AsRef<[u8]>) {
        self.file.write_all(bytes.as_ref()).expect("there is room");
    }

    /// Renames the file, and creates a new one with the old name.
    fn rotate(&mut self) {
        std::fs::rename(self.path(), self.dir.path().join("log.1")).expect("it is there");
        self.file = open(self.path());
    }

    async fn tail(&self, args: &[&str]) -> Example {
        let path = self.path();
        let path = path
            .to_str()
            .expect("temporary directories have plain names");
        Example::start("tail", &[&["--every", "10", path], args].concat()).await
    }
}

fn open(path: PathBuf) -> File {
    let mut options = OpenOptions::new();
    options.create(true).append(true);
    options.open(path).expect("it can be written")
}

/// Bytes that differ everywhere: lines of 16 bytes, each with its number.
fn numbered(lines: usize) -> Vec<u8> {
    (0..lines)
        .flat_map(|n| format!("{n:015}\n").into_bytes())
        .collect()
}

async fn connect(tail: &Example, receive_buffer: u32) -> TcpStream {
    let socket = TcpSocket::new_v4().expect("a socket can be had");
    socket
        .set_recv_buffer_size(receive_buffer)
        .expect("any size will do");
    let stream = soon("a connection", socket.connect(tail.addr())).await;
    stream.expect("the server listens")
}

/// Reads exactly `bytes` bytes.
async fn take(stream: &mut TcpStream, bytes: usize) -> Vec<u8> {
    let mut taken = vec![0; bytes];
    let read = soon("all bytes", stream.read_exact(&mut taken)).await;
    read.expect("the connection lasts");
    taken
}

#[tokio::test]
async fn what_is_there_and_what_is_added_comes_from_the_start() {
    let mut log = Growing::new();
    log.append("there\n");
    let tail = log.tail(&["--from-start"]).await;
    let mut client = Client::connect(tail.addr()).await;
    assert_eq!(client.line().await, "there");

    log.append("added\n");

    assert_eq!(client.line().await, "added");
}

#[tokio::test]
async fn without_from_start_only_what_is_added_comes() {
    let mut log = Growing::new();
    log.append("there\n");
    let tail = log.tail(&[]).await;
    let mut client = Client::connect(tail.addr()).await;

    // The client's start position is set on the server some time after the connect, which cannot be
    // seen from here. So append until a line arrives.
    let first = soon("a line", async {
        let mut first = Box::pin(client.line());
        for n in 0.. {
            tokio::select! {
                line = &mut first => return line,
                () = tokio::time::sleep(std::time::Duration::from_millis(20)) => {
                    log.append(format!("{n}\n"));
                }
            }
        }
        unreachable!("numbers do not end")
    })
    .await;

    let first: usize = first.parse().expect("nothing of what was there before");
    log.append("end\n");
    for n in first + 1.. {
        match client.line().await.as_str() {
            "end" => break,
            line => assert_eq!(line, n.to_string()),
        }
    }
}

#[tokio::test]
async fn a_slow_client_gets_every_byte_and_holds_up_no_other() {
    const LINES: usize = 1024 * 1024;
    let bytes = numbered(LINES);
    let mut log = Growing::new();
    let tail = log.tail(&["--from-start"]).await;
    let mut slow = connect(&tail, 4096).await;
    let mut fast = connect(&tail, 256 * 1024).await;

    let mut seen = Vec::new();
    for part in bytes.chunks(bytes.len() / 8) {
        log.append(part);
        seen.extend(take(&mut fast, part.len()).await);
    }

    assert!(
        seen == bytes,
        "the fast one has every byte, and the slow one has read none"
    );
    assert!(
        take(&mut slow, bytes.len()).await == bytes,
        "the slow one catches up from the file"
    );
}

#[tokio::test]
async fn clients_that_never_read_take_no_memory() {
    const CLIENTS: usize = 20;
    let mut log = Growing::new();
    let tail = log.tail(&["--from-start"]).await;
    let mut never = Vec::new();
    for _ in 0..CLIENTS {
        never.push(connect(&tail, 4096).await);
    }
    let mut reader = connect(&tail, 256 * 1024).await;
    let part = numbered(64 * 1024);
    log.append(&part);
    assert!(take(&mut reader, part.len()).await == part);
    let before = tail.resident();

    for _ in 0..64 {
        log.append(&part);
        assert!(take(&mut reader, part.len()).await == part);
    }

    let after = tail.resident();
    println!("64 MiB past {CLIENTS} that never read: resident {before} KiB, then {after} KiB");
    assert!(after < before + 8 * 1024, "{before} KiB, then {after} KiB");
}

#[tokio::test]
async fn a_file_cut_short_is_read_from_its_start_again() {
    let mut log = Growing::new();
    log.append("a long line of before\n");
    let tail = log.tail(&["--from-start"]).await;
    let mut client = Client::connect(tail.addr()).await;
    assert_eq!(client.line().await, "a long line of before");

    log.file.set_len(0).unwrap();
    log.append("anew\n");

    assert_eq!(client.line().await, "anew");
}

#[tokio::test]
async fn a_rotated_file_is_read_to_its_end_and_then_the_new_one() {
    let mut log = Growing::new();
    let old = numbered(256 * 1024);
    log.append(&old);
    let tail = log.tail(&["--from-start"]).await;
    let mut client = connect(&tail, 4096).await;
    // The client now reads the old file, which a connect alone does not show.
    assert_eq!(take(&mut client, 16).await, old[..16]);

    log.rotate();
    log.append("new\n");
    // Another client reads the new file before the first has read the rest of the old one.
    let mut other = Client::connect(tail.addr()).await;
    soon("the new file", async {
        while other.line().await != "new" {}
    })
    .await;

    assert!(take(&mut client, old.len() - 16).await == old[16..]);
    assert_eq!(take(&mut client, 4).await, b"new\n");
}

#[tokio::test]
async fn a_pipe_that_takes_the_name_is_not_waited_for() {
    let mut log = Growing::new();
    let tail = log.tail(&["--from-start"]).await;
    let mut client = Client::connect(tail.addr()).await;
    log.append("before\n");
    assert_eq!(client.line().await, "before");

    std::fs::remove_file(log.path()).unwrap();
    let made = std::process::Command::new("mkfifo")
        .arg(log.path())
        .status()
        .unwrap();
    assert!(made.success());
    tail.logged(1, &["something else"]).await;
    log.rotate();
    log.append("after\n");

    assert_eq!(client.line().await, "after");
}

#[tokio::test]
async fn what_clients_send_is_ignored() {
    let mut log = Growing::new();
    let tail = log.tail(&["--from-start"]).await;
    let mut client = Client::connect(tail.addr()).await;

    client.send("x".repeat(100_000)).await;
    log.append("news\n");

    assert_eq!(client.line().await, "news");
}

#[tokio::test]
async fn one_who_is_done_sending_is_let_go() {
    let log = Growing::new();
    let tail = log.tail(&[]).await;
    let mut client = Client::connect(tail.addr()).await;

    client.half_close().await;

    assert_eq!(client.rest().await, b"");
    tail.logged(1, &["connection.closed", "\"peer_closed\""])
        .await;
}

#[tokio::test]
async fn a_file_that_is_not_there_is_an_error_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let mut tail = tokio::process::Command::new(process::path("tail"));
    tail.arg(dir.path().join("none")).kill_on_drop(true);

    let ended = soon("its end", tail.output()).await.unwrap();

    assert!(!ended.status.success());
}
