//! A server's process goes on, whatever its clocks and its log do.

use std::process::Stdio;
use std::time::Duration;

use process::{Client, Example, installed, soon};
use tokio::process::Command;
use tokio::time::Instant;

#[path = "support/process.rs"]
mod process;

/// Starts the example `chat`, which closes a member that is silent for two seconds.
async fn chat_by(by: &[&str]) -> Example {
    Example::start_by(by, "chat", &["--idle", "2"]).await
}

async fn enter(chat: &Example, name: &str) -> Client {
    let mut member = Client::connect(chat.addr()).await;
    assert_eq!(member.line().await, "* welcome! what is your name?");
    let hello = format!("* hello {name}; /help lists the commands");
    assert_eq!(member.ask(name).await, hello);
    member
}

/// Asserts that a member that says nothing more is closed after two seconds.
async fn is_closed_in_two_seconds(mut member: Client) {
    let said = Instant::now();

    assert_eq!(member.line().await, "* bye: silent for too long");

    let silent = said.elapsed();
    assert!(silent > Duration::from_millis(1900), "{silent:?}");
    assert_eq!(member.rest().await, b"");
}

#[tokio::test]
async fn g3_a_jump_of_the_wall_clock_changes_no_deadline() {
    if !installed("faketime") {
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let clock = dir.path().join("clock");
    std::fs::write(&clock, "+0d\n").expect("it is written");
    // `env` runs the example itself with faketime's library, so its clock follows the file.
    let library = Command::new("faketime")
        .args(["-f", "+0d", "printenv", "LD_PRELOAD"])
        .stdin(Stdio::null())
        .output();
    let library = soon("faketime", library).await.expect("it runs").stdout;
    let library = String::from_utf8(library).expect("a path");
    let chat = chat_by(&[
        "env",
        &format!("LD_PRELOAD={}", library.trim()),
        &format!("FAKETIME_TIMESTAMP_FILE={}", clock.display()),
        "FAKETIME_NO_CACHE=1",
        "FAKETIME_DONT_FAKE_MONOTONIC=1",
    ])
    .await;
    let days = ["+400d\n", "-400d\n"];
    let mut years = Vec::new();

    for (n, jump) in days.into_iter().enumerate() {
        let mut member = enter(&chat, "ann").await;
        std::fs::write(&clock, jump).expect("it is written");
        assert_eq!(member.ask("/rooms").await, "* rooms:");
        let addr = member.addr;
        is_closed_in_two_seconds(member).await;
        let logged = chat.logged(n + 1, &["connection.closed"]).await;
        assert!(logged[n].contains(&addr.port().to_string()), "{logged:?}");
        years.push(logged[n].split('-').next().map(str::to_owned));
    }

    // The stamps in the log did jump.
    assert_ne!(years[0], years[1], "{years:?}");
}

#[tokio::test]
async fn g4_a_monotonic_clock_of_thirty_years_overflows_nothing() {
    let by = ["unshare", "--time", "--monotonic", "1000000000"];
    let may = Command::new(by[0]).args(&by[1..]).arg("true").output();
    if !soon("unshare", may)
        .await
        .is_ok_and(|ran| ran.status.success())
    {
        eprintln!("skipped: this system gives no process a clock of its own");
        return;
    }
    let chat = chat_by(&by).await;

    let mut member = enter(&chat, "ann").await;
    assert_eq!(member.ask("/rooms").await, "* rooms:");

    is_closed_in_two_seconds(member).await;
    let ended = chat.stop().await;
    assert!(ended.status.success());
}

#[tokio::test]
async fn k3_a_log_that_cannot_be_written_changes_nothing() {
    let full = ["sh", "-c", "exec \"$@\" 2>/dev/full", "sh"];
    let nobody_reads = ["bash", "-c", "exec \"$@\" 2> >(exec true)", "bash"];
    for by in [full, nobody_reads] {
        let chat = chat_by(&by).await;
        for _ in 0..100 {
            let mut member = enter(&chat, "ann").await;
            assert_eq!(member.ask("/quit").await, "* bye: quit");
            assert_eq!(member.rest().await, b"");
        }
        // Also the events of a shutdown.
        let mut member = enter(&chat, "ann").await;

        let ended = tokio::spawn(chat.stop());

        assert_eq!(member.line().await, "* bye: the server shuts down");
        drop(member);
        let ended = ended.await.expect("it does not panic");
        assert!(ended.status.success());
        assert_eq!(ended.log, Vec::<String>::new());
    }
}
