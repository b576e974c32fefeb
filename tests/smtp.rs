//! The `smtp` example follows its protocol with swaks, with pipelining clients and with attackers.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use proptest::prelude::*;
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, DuplexStream};
use tokio::process::Command as Program;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_util::codec::{Decoder, Encoder};
use tower_tcp::EndReason;
use tower_tcp::admit::ConnectionLimit;
use tower_tcp::testkit::{Served, faults, serve};
use tower_tcp::tls::Tls;

use answer::{Answer, GO_AHEAD};
use certificates::certified;
use codec::{Flaw, Input, MAX_COMMAND, MAX_TEXT_LINE, Smtp};
use command::Command;
use maildir::Maildir;
use memory::Memory;
use process::{Client as Socket, Example, soon};
use session::{MAX_MISTAKES, MAX_RECIPIENTS, Shared};
use store::Store;
use support::{Client, Clients, Ends};

#[path = "../examples/smtp/answer.rs"]
mod answer;
#[path = "support/certificates.rs"]
mod certificates;
#[path = "../examples/smtp/codec.rs"]
mod codec;
#[path = "../examples/smtp/command.rs"]
mod command;
#[path = "../examples/smtp/maildir.rs"]
mod maildir;
#[path = "../examples/smtp/memory.rs"]
mod memory;
#[path = "support/process.rs"]
mod process;
#[path = "../examples/smtp/service.rs"]
mod service;
#[path = "../examples/smtp/session.rs"]
mod session;
#[path = "../examples/smtp/store.rs"]
mod store;
mod support;

const MAX_SIZE: usize = 64 * 1024;
const ENVELOPE: &str = "EHLO me\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\n";
/// The reply codes of an envelope, the banner's first.
const ENVELOPE_CODES: [u16; 5] = [220, 250, 250, 250, 354];

// The codec.

/// Decodes `input`, which arrives in pieces of these sizes at a server that answers DATA with 354.
/// The pieces of a text are joined.
fn read(input: &[u8], pieces: &[usize]) -> Vec<Input> {
    let mut codec = Smtp::default();
    let mut buffer = BytesMut::new();
    let mut inputs = Vec::new();
    let mut text = Vec::new();
    let mut rest = input;
    let mut pieces = pieces.iter().copied().cycle();
    while !rest.is_empty() {
        let piece = pieces.next().expect("there is a size").min(rest.len());
        buffer.extend_from_slice(&rest[..piece]);
        rest = &rest[piece..];
        while let Some(input) = codec.decode(&mut buffer).expect("it does no I/O") {
            match input {
                Input::Text(piece) => text.extend_from_slice(&piece),
                Input::Command(Ok(Command::Data)) => {
                    inputs.push(input);
                    let answer = Answer::new(GO_AHEAD, "go");
                    codec
                        .encode(answer, &mut BytesMut::new())
                        .expect("it does no I/O");
                }
                Input::EndOfText(end) => {
                    if end.is_ok() {
                        inputs.push(Input::Text(Bytes::from(std::mem::take(&mut text))));
                    }
                    text.clear();
                    inputs.push(input);
                }
                Input::Command(_) => inputs.push(input),
            }
        }
    }
    inputs
}

fn read_whole(input: impl AsRef<[u8]>) -> Vec<Input> {
    read(input.as_ref(), &[usize::MAX])
}

/// Decodes a text after its DATA.
fn text(text: impl AsRef<[u8]>) -> Vec<Input> {
    let mut inputs = read_whole([b"DATA\r\n", text.as_ref()].concat());
    assert_eq!(inputs.remove(0), Input::Command(Ok(Command::Data)));
    inputs
}

fn whole(text: impl Into<Bytes>) -> Vec<Input> {
    vec![Input::Text(text.into()), Input::EndOfText(Ok(()))]
}

#[test]
fn a_mail_ends_at_its_dot_and_commands_follow() {
    let mut inputs = text("a\r\nb\r\n.\r\nNOOP\r\n");

    assert_eq!(inputs.pop(), Some(Input::Command(Ok(Command::Noop))));
    assert_eq!(inputs, whole("a\r\nb\r\n"));
    assert_eq!(text(".\r\n"), whole(""));
}

#[test]
fn dots_of_transparency_are_taken_off() {
    assert_eq!(text("..\r\n.a\r\n...\r\n.\r\n"), whole(".\r\na\r\n..\r\n"));
}

#[test]
fn nothing_but_a_dot_between_whole_line_breaks_ends_a_mail() {
    for end in [
        "\n.\n",
        "\n.\r\n",
        "\r\n.\n",
        "\r.\r",
        "\r\n.\r",
        "\r.\r\n",
        "\r\n.\r\r\n",
        "\n\n.\r\n",
        "\0.\r\n",
    ] {
        let inputs = text(format!("a{end}QUIT\r\n"));

        assert_eq!(inputs, [], "{end:?}");
    }
}

#[test]
fn a_text_with_a_bare_line_break_is_read_to_its_end_and_refused() {
    for bare in ["a\nb", "a\rb", "\n", "a\r\r\nb", ".\n", ".\rb"] {
        let inputs = text(format!("{bare}\r\n.\r\nNOOP\r\n"));

        let refused = Input::EndOfText(Err(Flaw::BareLineBreak));
        let noop = Input::Command(Ok(Command::Noop));
        assert_eq!(inputs, [refused, noop], "{bare:?}");
    }
}

#[test]
fn a_line_of_text_may_be_as_long_as_the_standard_says() {
    let line = "x".repeat(MAX_TEXT_LINE - 2);

    assert_eq!(
        text(format!("{line}\r\n.\r\n")),
        whole(format!("{line}\r\n"))
    );
    let stuffed = format!(".{}", &line[1..]);
    assert_eq!(
        text(format!(".{stuffed}\r\n.\r\n")),
        whole(format!("{stuffed}\r\n"))
    );
    assert_eq!(
        text(format!("{line}x\r\n.\r\n")),
        [Input::EndOfText(Err(Flaw::LongLine))]
    );
}

#[test]
fn a_command_may_be_as_long_as_the_standard_says() {
    let line = |length: usize| format!("NOOP {}\r\n", "x".repeat(length - "NOOP \r\n".len()));
    let too_long = Input::Command(Err(Answer::new(500, "Line too long")));
    let noop = Input::Command(Ok(Command::Noop));

    assert_eq!(read_whole(line(MAX_COMMAND)), std::slice::from_ref(&noop));
    assert_eq!(
        read_whole(line(MAX_COMMAND + 1) + "NOOP\r\n"),
        [too_long.clone(), noop.clone()]
    );
    assert_eq!(read_whole(line(100_000) + "NOOP\r\n"), [too_long, noop]);
}

#[test]
fn a_line_that_ends_with_lf_alone_is_answered_and_not_run() {
    let refused = Input::Command(Err(Answer::new(500, "A line ends with CRLF")));

    assert_eq!(
        read_whole("NOOP\nNOOP\r\n"),
        [refused, Input::Command(Ok(Command::Noop))]
    );
}

#[test]
fn an_endless_line_is_not_kept() {
    let mut codec = Smtp::default();
    let mut buffer = BytesMut::new();

    for _ in 0..100 {
        buffer.extend_from_slice(&[b'x'; 10_000]);
        let input = codec.decode(&mut buffer).expect("it does no I/O");

        assert_eq!(input, None);
        assert!(buffer.is_empty());
    }
}

/// Generates input that is rich in bytes with a meaning to the codec.
fn lines() -> impl Strategy<Value = Vec<u8>> {
    let parts: [&[u8]; 9] = [
        b"\r\n",
        b"\r\n",
        b"\r",
        b"\n",
        b".",
        b"x",
        b"DATA\r\n",
        b"\r\n.\r\n",
        &[b'y'; 600],
    ];
    prop::collection::vec(prop::sample::select(parts.to_vec()), 0..40)
        .prop_map(|parts| parts.concat())
}

proptest! {
    #[test]
    fn the_pieces_that_input_comes_in_change_nothing(
        input in lines(),
        pieces in prop::collection::vec(1..700_usize, 1..10),
    ) {
        prop_assert_eq!(read(&input, &pieces), read_whole(&input));
    }

    #[test]
    fn whatever_lines_a_client_makes_transparent_arrive(
        lines in prop::collection::vec("[.a]{0,4}", 0..20),
        pieces in prop::collection::vec(1..10_usize, 1..10),
    ) {
        let (mut sent, mut meant) = (b"DATA\r\n".to_vec(), Vec::new());
        for line in lines {
            if line.starts_with('.') {
                sent.push(b'.');
            }
            sent.extend_from_slice(format!("{line}\r\n").as_bytes());
            meant.extend_from_slice(format!("{line}\r\n").as_bytes());
        }
        sent.extend_from_slice(b".\r\n");

        let inputs = read(&sent, &pieces);

        prop_assert_eq!(&inputs[1..], &whole(meant)[..]);
    }

    #[test]
    fn no_command_line_makes_the_parser_panic(line in prop::collection::vec(any::<u8>(), 0..80)) {
        drop(Command::parse(&line));
    }

    #[test]
    fn no_address_makes_the_parser_panic(rest in r#"[ <>@:"\\.a=]{0,20}"#) {
        drop(Command::parse(format!("MAIL FROM:{rest}").as_bytes()));
        drop(Command::parse(format!("RCPT TO:{rest}").as_bytes()));
    }
}

// Commands.

fn code(line: &str) -> u16 {
    Command::parse(line.as_bytes()).map_or_else(|answer| answer.code, |_command| 250)
}

#[test]
fn commands_are_understood_in_any_case() {
    let hello = |extended| Command::Hello {
        client: "me".to_owned(),
        extended,
    };
    for (line, command) in [
        ("EHLO me", hello(true)),
        ("helo me", hello(false)),
        ("StartTLS", Command::StartTls),
        ("data", Command::Data),
        ("RSET  ", Command::Reset),
        ("vrfy me", Command::Verify),
        ("noop whatever", Command::Noop),
        ("quit", Command::Quit),
    ] {
        assert_eq!(Command::parse(line.as_bytes()), Ok(command), "{line}");
    }
}

#[test]
fn what_is_no_command_has_its_code() {
    for (line, expected) in [
        ("", 500),
        ("HELLO me", 500),
        ("AUTH PLAIN", 500),
        ("NOOP \r RSET", 500),
        ("NOOP \u{fc}", 500),
        ("EXPN list", 502),
        ("EHLO", 501),
        ("EHLO you and me", 501),
        ("DATA now", 501),
        ("STARTTLS now", 501),
        ("VRFY", 501),
        ("MAIL", 501),
        ("MAIL FROM:a@b", 501),
        ("MAIL FROM:<a@b", 501),
        ("MAIL FROM:<a@b>SIZE=1", 501),
        ("MAIL FROM:<a b@c>", 501),
        ("MAIL FROM:<@>", 501),
        ("MAIL FROM:<a@b> SIZE=x", 501),
        ("MAIL FROM:<a@b> SIZE", 501),
        ("MAIL FROM:<a@b> BODY=BINARYMIME", 501),
        ("MAIL FROM:<a@b> RET=FULL", 555),
        ("RCPT TO:<>", 501),
        ("RCPT TO:<me>", 501),
        ("RCPT TO:<a@b> NOTIFY=NEVER", 555),
    ] {
        assert_eq!(code(line), expected, "{line:?}");
    }
    let long = "x".repeat(65);
    assert_eq!(code(&format!("RCPT TO:<{long}@b>")), 501);
    assert_eq!(code(&format!("RCPT TO:<{}@b>", &long[1..])), 250);
}

#[test]
fn addresses_are_taken_out_of_their_brackets() {
    for (path, address) in [
        ("<>", ""),
        ("<a@b>", "a@b"),
        (" <a@[127.0.0.1]> ", "a@[127.0.0.1]"),
        ("<Postmaster>", "Postmaster"),
        ("<@one,@two:a@b>", "a@b"),
        (r#"<"a>\" @"@b>"#, r#""a>\" @"@b"#),
    ] {
        let parsed = Command::parse(format!("MAIL FROM:{path}").as_bytes());

        let from = address.to_owned();
        assert_eq!(parsed, Ok(Command::Mail { from, size: None }), "{path}");
    }
}

#[test]
fn the_declared_size_is_read_however_large() {
    for (size, expected) in [("0", 0), ("99", 99), ("99999999999999999999", u64::MAX)] {
        let line = format!("MAIL FROM:<a@b> body=8bitmime Size={size}");

        let parsed = Command::parse(line.as_bytes());

        let (from, size) = ("a@b".to_owned(), Some(expected));
        assert_eq!(parsed, Ok(Command::Mail { from, size }));
    }
}

// Sessions, in memory and under paused time.

struct Smtpd {
    served: Served,
    shared: Arc<Shared>,
    memory: Memory,
    connector: TlsConnector,
}

impl Smtpd {
    fn start() -> Self {
        let memory = Memory::new(4 * MAX_SIZE);
        Self::keeping(Store::Memory(memory.clone()), memory)
    }

    fn keeping(store: Store, memory: Memory) -> Self {
        Self::limited(&ConnectionLimit::unlimited(), store, memory)
    }

    fn limited(limit: &ConnectionLimit, store: Store, memory: Memory) -> Self {
        let (server, client) = certified();
        let (tls, connector) = (Tls::from(server), TlsConnector::from(client));
        let shared = Arc::new(Shared::new("here".to_owned(), MAX_SIZE as u64, store));
        Self {
            served: serve(service::smtp(Arc::clone(&shared), tls, limit)),
            shared,
            memory,
            connector,
        }
    }

    async fn connect(&self) -> Client<DuplexStream> {
        self.served.client().await
    }

    /// Runs a whole session. Returns the codes of the replies.
    async fn codes(&self, said: impl AsRef<[u8]>) -> Vec<u16> {
        let mut client = self.connect().await;
        client.send(said).await;
        client.finish().await;
        let rest = client.rest().await;
        codes(&rest)
    }

    /// Returns the texts of the mails, without the header that the server added.
    fn texts(&self) -> Vec<String> {
        let texts = self.memory.mails().into_iter().map(|mail| {
            let mail = String::from_utf8(mail.to_vec()).expect("these are text");
            let at = mail.find("\tby ").expect("it has a trace");
            let (_, text) = mail[at..].split_once("\r\n").expect("a line");
            text.to_owned()
        });
        texts.collect()
    }
}

/// Returns the code of each reply, taken from its last line.
fn codes(lines: &[String]) -> Vec<u16> {
    let last = lines.iter().filter(|line| line.as_bytes()[3] == b' ');
    last.map(|line| line[..3].parse().expect("a code"))
        .collect()
}

/// Reads a reply.
async fn reply<Io: AsyncRead + AsyncWrite + Unpin>(client: &mut Client<Io>) -> Vec<String> {
    let mut lines = vec![client.line().await];
    while lines
        .last()
        .is_some_and(|line| line.as_bytes().get(3) == Some(&b'-'))
    {
        lines.push(client.line().await);
    }
    lines
}

/// Sends a command. Returns the code of the reply.
async fn ask<Io: AsyncRead + AsyncWrite + Unpin>(client: &mut Client<Io>, command: &str) -> u16 {
    client.send(format!("{command}\r\n")).await;
    codes(&reply(client).await)[0]
}

/// Proceeds up to DATA.
async fn up_to_data(client: &mut Client<DuplexStream>) {
    client.send(ENVELOPE).await;
    for code in ENVELOPE_CODES {
        assert_eq!(codes(&reply(client).await), [code]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_is_greeted_and_told_what_can_be_done() {
    let smtpd = Smtpd::start();
    let mut client = smtpd.connect().await;

    assert_eq!(client.line().await, "220 here ESMTP");
    client.send("EHLO me\r\n").await;

    assert_eq!(
        reply(&mut client).await,
        [
            "250-here greets me",
            "250-PIPELINING",
            "250-SIZE 65536",
            "250-8BITMIME",
            "250-HELP",
            "250 STARTTLS",
        ]
    );
    client.send("HELO me\r\n").await;
    assert_eq!(reply(&mut client).await, ["250 here greets me"]);
}

#[tokio::test(start_paused = true)]
async fn commands_out_of_order_are_told_so_and_change_nothing() {
    let smtpd = Smtpd::start();
    let mut client = smtpd.connect().await;
    reply(&mut client).await;

    for (command, code) in [
        ("MAIL FROM:<a@b>", 503),
        ("EHLO me", 250),
        ("RCPT TO:<a@b>", 503),
        ("DATA", 503),
        ("MAIL FROM:<a@b>", 250),
        ("MAIL FROM:<a@b>", 503),
        ("DATA", 554),
        ("RCPT TO:<a@b>", 250),
        ("RSET", 250),
        ("DATA", 503),
        ("MAIL FROM:<a@b>", 250),
        ("EHLO me", 250),
        ("RCPT TO:<a@b>", 503),
        ("VRFY a", 252),
        ("NOOP", 250),
        ("QUIT", 221),
    ] {
        assert_eq!(ask(&mut client, command).await, code, "{command}");
    }
}

#[tokio::test(start_paused = true)]
async fn two_mails_that_were_sent_ahead_are_kept_in_one_session() {
    let smtpd = Smtpd::start();
    let second = ENVELOPE.replace("EHLO me\r\n", "");
    let said = format!("{ENVELOPE}one\r\n.\r\n{second}two\r\n..\r\n.\r\nQUIT\r\nNOOP\r\n");

    let codes = smtpd.codes(said).await;

    let expected = [&ENVELOPE_CODES[..], &[250, 250, 250, 354, 250, 221]].concat();
    assert_eq!(codes, expected);
    assert_eq!(smtpd.texts(), ["one\r\n", "two\r\n.\r\n"]);
    assert_eq!(smtpd.served.reason().await, EndReason::ServiceClosed);
}

#[tokio::test(start_paused = true)]
async fn a_client_that_half_closes_gets_all_its_replies() {
    let smtpd = Smtpd::start();

    let codes = smtpd.codes(format!("{ENVELOPE}one\r\n.\r\n")).await;

    assert_eq!(codes, [&ENVELOPE_CODES[..], &[250]].concat());
    assert_eq!(smtpd.texts(), ["one\r\n"]);
    assert_eq!(smtpd.served.reason().await, EndReason::PeerClosed);
}

#[tokio::test(start_paused = true)]
async fn a_mail_that_is_cut_off_is_none() {
    let smtpd = Smtpd::start();

    let codes = smtpd.codes(format!("{ENVELOPE}one\r\n.\r")).await;

    assert_eq!(codes, ENVELOPE_CODES);
    assert_eq!(smtpd.texts(), [""; 0]);
    assert_eq!(smtpd.served.reason().await, EndReason::Truncated);
}

#[tokio::test(start_paused = true)]
async fn a_command_that_is_cut_off_is_reported_as_such() {
    let smtpd = Smtpd::start();

    // From the third one on, the command is too long and is skipped.
    for length in [1, MAX_COMMAND - 1, MAX_COMMAND, 100_000] {
        let codes = smtpd.codes("x".repeat(length)).await;

        assert_eq!(codes, [220]);
        assert_eq!(
            smtpd.served.reason().await,
            EndReason::Truncated,
            "{length}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn what_a_server_has_to_write_into_a_mail_stands_in_front() {
    let smtpd = Smtpd::start();
    let mut client = smtpd.connect().await;
    reply(&mut client).await;
    for command in [
        "EHLO me",
        "MAIL FROM:<>",
        "RCPT TO:<a@b>",
        "RCPT TO:<c@d>",
        "DATA",
    ] {
        ask(&mut client, command).await;
    }

    assert_eq!(ask(&mut client, "Subject: x\r\n\r\ny\r\n.").await, 250);

    let mail = String::from_utf8(smtpd.memory.mails()[0].to_vec()).unwrap();
    let lines: Vec<_> = mail.split("\r\n").collect();
    assert_eq!(
        lines[..3],
        ["Return-Path: <>", "Delivered-To: a@b", "Delivered-To: c@d"]
    );
    assert!(lines[3].starts_with("Received: from me (["), "{mail}");
    assert!(lines[4].starts_with("\tby here with ESMTP; "), "{mail}");
    assert!(lines[4].ends_with(" +0000"), "{mail}");
    assert_eq!(lines[5..], ["Subject: x", "", "y", ""]);
}

#[tokio::test(start_paused = true)]
async fn a_mail_over_the_size_is_refused_at_its_end_and_the_session_goes_on() {
    let smtpd = Smtpd::start();
    let mut client = smtpd.connect().await;
    up_to_data(&mut client).await;
    let line = format!("{}\r\n", "x".repeat(1022 - 64));
    let most = line.repeat(MAX_SIZE / line.len()) + &"x".repeat(MAX_SIZE % line.len() - 2) + "\r\n";
    assert_eq!(most.len(), MAX_SIZE);

    assert_eq!(ask(&mut client, &format!("x{most}.")).await, 552);
    client.send(&ENVELOPE[9..]).await;
    for code in [250, 250, 354] {
        assert_eq!(codes(&reply(&mut client).await), [code]);
    }

    assert_eq!(ask(&mut client, &format!("{most}.")).await, 250);
    assert_eq!(smtpd.texts(), [most]);
}

#[tokio::test(start_paused = true)]
async fn a_size_that_is_declared_is_refused_before_the_mail() {
    let smtpd = Smtpd::start();
    let mut client = smtpd.connect().await;
    reply(&mut client).await;
    ask(&mut client, "EHLO me").await;

    assert_eq!(ask(&mut client, "MAIL FROM:<a@b> SIZE=65537").await, 552);
    assert_eq!(ask(&mut client, "RCPT TO:<a@b>").await, 503);
    assert_eq!(ask(&mut client, "MAIL FROM:<a@b> SIZE=65536").await, 250);
}

#[tokio::test(start_paused = true)]
async fn a_hundred_recipients_are_taken_and_one_more_is_not() {
    let smtpd = Smtpd::start();
    let mut client = smtpd.connect().await;
    reply(&mut client).await;
    ask(&mut client, "EHLO me").await;
    ask(&mut client, "MAIL FROM:<a@b>").await;

    for n in 0..MAX_RECIPIENTS {
        assert_eq!(ask(&mut client, &format!("RCPT TO:<{n}@b>")).await, 250);
    }

    assert_eq!(ask(&mut client, "RCPT TO:<one-more@b>").await, 452);
    assert_eq!(ask(&mut client, "DATA").await, 354);
}

#[tokio::test(start_paused = true)]
async fn too_many_mistakes_end_the_session() {
    let smtpd = Smtpd::start();
    let said = "EHLO\r\nWHAT\r\n".repeat(MAX_MISTAKES);

    let mut codes = smtpd.codes(said).await;

    assert_eq!(codes.pop(), Some(421));
    assert_eq!(
        codes,
        [&[220][..], &[501, 500].repeat(MAX_MISTAKES / 2)].concat()
    );
    assert_eq!(smtpd.served.reason().await, EndReason::ServiceClosed);
}

#[tokio::test(start_paused = true)]
async fn a_mail_cannot_be_smuggled_within_another() {
    for end in ["\n.\n", "\n.\r\n", "\r\n.\n", "\r.\r", "\r\n.\r\r\n"] {
        let smtpd = Smtpd::start();
        let smuggled = ENVELOPE.replace("a@b", "sentinel@evil");
        let said = format!("{ENVELOPE}one{end}{smuggled}two\r\n.\r\nQUIT\r\n");

        let codes = smtpd.codes(said).await;

        assert_eq!(
            codes,
            [&ENVELOPE_CODES[..], &[554, 221]].concat(),
            "{end:?}"
        );
        assert_eq!(smtpd.texts(), [""; 0], "{end:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn lines_that_are_too_long_are_refused_and_the_session_goes_on() {
    let smtpd = Smtpd::start();
    let long = "x".repeat(MAX_TEXT_LINE);

    let codes = smtpd
        .codes(format!("NOOP {long}\r\n{ENVELOPE}{long}\r\n.\r\nNOOP\r\n"))
        .await;

    assert_eq!(codes, [220, 500, 250, 250, 250, 354, 554, 250]);
    assert_eq!(smtpd.texts(), [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn an_idle_client_has_five_minutes_and_is_told_so() {
    let smtpd = Smtpd::start();
    let mut client = smtpd.connect().await;
    reply(&mut client).await;

    tokio::time::sleep(std::time::Duration::from_secs(299)).await;
    assert_eq!(ask(&mut client, "NOOP").await, 250);
    tokio::time::sleep(std::time::Duration::from_secs(301)).await;

    assert_eq!(codes(&client.rest().await), [421]);
    drop(client);
    assert_eq!(smtpd.served.reason().await, EndReason::IdleTimeout);
}

// STARTTLS.

/// Returns a client that trusts the server, after its handshake.
async fn secured(
    smtpd: &Smtpd,
    client: Client<DuplexStream>,
) -> Client<tokio_rustls::client::TlsStream<DuplexStream>> {
    let name = ServerName::try_from("localhost").expect("a valid name");
    let connecting = smtpd.connector.connect(name, client.0.into_inner());
    Client::new(connecting.await.expect("the handshake is done"))
}

#[tokio::test(start_paused = true)]
async fn within_tls_nothing_is_known_of_what_was_said_before() {
    let smtpd = Smtpd::start();
    let mut client = smtpd.connect().await;
    reply(&mut client).await;
    for command in ["EHLO me", "MAIL FROM:<a@b>", "RCPT TO:<c@d>"] {
        assert_eq!(ask(&mut client, command).await, 250);
    }
    assert_eq!(ask(&mut client, "STARTTLS").await, 220);
    let mut client = secured(&smtpd, client).await;

    assert_eq!(ask(&mut client, "RCPT TO:<c@d>").await, 503);
    assert_eq!(ask(&mut client, "MAIL FROM:<a@b>").await, 503);
    client.send("EHLO me\r\n").await;
    let offered = reply(&mut client).await;
    assert!(!offered.concat().contains("STARTTLS"), "{offered:?}");
    assert_eq!(ask(&mut client, "STARTTLS").await, 503);
    for (command, code) in [
        ("MAIL FROM:<a@b>", 250),
        ("RCPT TO:<c@d>", 250),
        ("DATA", 354),
        ("x\r\n.", 250),
    ] {
        assert_eq!(ask(&mut client, command).await, code, "{command}");
    }
    let mail = String::from_utf8(smtpd.memory.mails()[0].to_vec()).unwrap();
    assert!(mail.contains("with ESMTPS;"), "{mail}");
}

#[tokio::test(start_paused = true)]
async fn commands_injected_behind_starttls_are_never_run() {
    let smtpd = Smtpd::start();
    let mut client = smtpd.connect().await;
    let sentinel = ENVELOPE.replace("a@b", "sentinel@evil");

    client
        .send(format!("EHLO me\r\nSTARTTLS\r\n{sentinel}x\r\n.\r\n"))
        .await;

    let replies = client.rest().await;
    assert_eq!(codes(&replies), [220, 250, 220]);
    assert_eq!(smtpd.served.reason().await, EndReason::Rejected);
    assert_eq!(smtpd.texts(), [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn commands_injected_in_place_of_the_handshake_are_never_run() {
    let smtpd = Smtpd::start();
    let mut client = smtpd.connect().await;
    reply(&mut client).await;
    assert_eq!(ask(&mut client, "STARTTLS").await, 220);

    client
        .send("EHLO me\r\nMAIL FROM:<sentinel@evil>\r\n")
        .await;

    let mut rest = Vec::new();
    client.0.read_to_end(&mut rest).await.unwrap();
    assert!(!rest.starts_with(b"250"), "{rest:?}");
    assert_eq!(smtpd.served.reason().await, EndReason::TlsHandshakeFailed);
}

// Leaving.

#[tokio::test(start_paused = true)]
async fn at_a_shutdown_every_client_is_told_so() {
    let smtpd = Smtpd::start();
    let mut client = smtpd.connect().await;
    reply(&mut client).await;
    smtpd.served.handle().pause();
    let mut late = smtpd.connect().await;

    smtpd.served.handle().shutdown();

    assert_eq!(codes(&client.rest().await), [421]);
    assert_eq!(codes(&late.rest().await), [220, 421]);
    drop((client, late));
    assert_eq!(smtpd.served.reason().await, EndReason::Drained);
    assert_eq!(smtpd.served.reason().await, EndReason::Drained);
}

#[tokio::test(start_paused = true)]
async fn a_client_within_tls_is_told_so_as_well() {
    let smtpd = Smtpd::start();
    let mut client = smtpd.connect().await;
    reply(&mut client).await;
    assert_eq!(ask(&mut client, "STARTTLS").await, 220);
    let mut client = secured(&smtpd, client).await;
    assert_eq!(ask(&mut client, "EHLO me").await, 250);

    smtpd.served.handle().shutdown();

    assert_eq!(codes(&client.rest().await), [421]);
}

#[tokio::test(start_paused = true)]
async fn a_client_over_the_limit_is_told_so_in_place_of_the_banner() {
    let memory = Memory::new(4 * MAX_SIZE);
    let store = Store::Memory(memory.clone());
    let smtpd = Smtpd::limited(&ConnectionLimit::new(1), store, memory);
    let mut inside = smtpd.connect().await;
    reply(&mut inside).await;

    let mut over = smtpd.connect().await;

    assert_eq!(codes(&over.rest().await), [421]);
    assert_eq!(ask(&mut inside, "NOOP").await, 250);
}

#[tokio::test(start_paused = true)]
async fn a_mail_that_is_coming_in_is_kept_before_a_shutdown_and_no_other_begins() {
    let smtpd = Smtpd::start();
    let mut client = smtpd.connect().await;
    up_to_data(&mut client).await;
    client.send("one\r\n").await;
    let shared = Arc::clone(&smtpd.shared);
    let finished = tokio::spawn(async move { drop(shared.finish_mails().await) });
    assert!(client.hears_nothing().await);
    assert!(!finished.is_finished());

    let other = smtpd.codes(ENVELOPE).await;
    client.send("two\r\n.\r\n").await;

    assert_eq!(other, [220, 250, 250, 250, 421]);
    assert_eq!(codes(&reply(&mut client).await), [250]);
    finished.await.unwrap();
    assert_eq!(smtpd.texts(), ["one\r\ntwo\r\n"]);
}

// The stored mail.

#[tokio::test(start_paused = true)]
async fn memory_keeps_the_last_mails_that_there_is_room_for() {
    let memory = Memory::new(10);
    let write = |text: &'static [u8]| {
        let mut draft = memory.begin();
        draft.write(text).map(|()| draft)
    };

    write(b"1234").unwrap().keep();
    write(b"abcd").unwrap().keep();
    let coming_in = write(b"567").unwrap();

    assert_eq!(memory.mails(), ["abcd"]);
    coming_in.keep();
    assert_eq!(memory.mails(), ["abcd", "567"]);
}

#[tokio::test(start_paused = true)]
async fn memory_that_is_full_of_mails_coming_in_takes_no_more() {
    let smtpd = Smtpd::start();
    let mut others = smtpd.memory.begin();
    others.write(&[b'x'; 4 * MAX_SIZE - 10]).unwrap();

    let codes = smtpd.codes(format!("{ENVELOPE}x\r\n.\r\n")).await;

    assert_eq!(codes[..5], [220, 250, 250, 250, 452]);
    drop(others);
    let codes = smtpd.codes(format!("{ENVELOPE}x\r\n.\r\n")).await;
    assert_eq!(codes, [&ENVELOPE_CODES[..], &[250]].concat());
}

/// Returns the files in a folder of a maildir.
fn files(maildir: &Path, folder: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(maildir.join(folder)).expect("the folder is there");
    entries
        .map(|entry| entry.expect("it can be read").path())
        .collect()
}

#[tokio::test]
async fn a_maildir_shows_a_mail_when_it_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    let maildir = Maildir::open(dir.path(), "a/b:c").unwrap();
    let mut draft = maildir.begin().await.unwrap();
    draft.write(b"one").await.unwrap();

    let before = (
        files(dir.path(), "tmp").len(),
        files(dir.path(), "new").len(),
    );
    draft.keep().await.unwrap();

    assert_eq!(before, (1, 0));
    assert!(files(dir.path(), "tmp").is_empty());
    let mails = files(dir.path(), "new");
    assert_eq!(mails.len(), 1);
    assert_eq!(std::fs::read(&mails[0]).unwrap(), b"one");
    let name = mails[0].file_name().unwrap().to_str().unwrap();
    assert!(name.ends_with(r".a\057b\072c"), "{name}");
}

#[tokio::test(start_paused = true)]
async fn a_mail_that_is_not_kept_leaves_nothing_in_a_maildir() {
    let dir = tempfile::tempdir().unwrap();
    let maildir = Store::Maildir(Maildir::open(dir.path(), "here").unwrap());
    let smtpd = Smtpd::keeping(maildir, Memory::new(0));
    let mut client = smtpd.connect().await;
    up_to_data(&mut client).await;

    let coming_in = files(dir.path(), "tmp").len();
    client.send("one\r\n").await;
    drop(client);

    assert_eq!(coming_in, 1);
    assert_eq!(smtpd.served.reason().await, EndReason::Truncated);
    assert!(files(dir.path(), "tmp").is_empty());
    assert!(files(dir.path(), "new").is_empty());
}

#[tokio::test(start_paused = true)]
async fn every_fault_at_every_byte_leaves_whole_replies_and_whole_mails() {
    let Smtpd { shared, memory, .. } = Smtpd::start();
    let (server, _client) = certified();
    let tls = Tls::from(server);
    let stack = move || {
        let unlimited = ConnectionLimit::unlimited();
        service::smtp(Arc::clone(&shared), tls.clone(), &unlimited)
    };
    let input = [
        ENVELOPE,
        "one\r\n..two\r\n.\r\nHELP me\r\nRCPT TO:<c@d>\r\nQUIT\r\n",
    ];
    let output = "220 here ESMTP\r\n250-here greets me\r\n250-PIPELINING\r\n250-SIZE 65536\r\n\
        250-8BITMIME\r\n250-HELP\r\n250 STARTTLS\r\n250 OK\r\n250 OK\r\n\
        354 Go ahead, to the end: CRLF.CRLF\r\n250 OK, kept\r\n214 RFC 5321\r\n\
        503 MAIL first\r\n221 Bye\r\n";

    faults::check(stack, input.concat(), output)
        .farewell("421 Silent for too long\r\n")
        .farewell("421 Closing down, come back later\r\n")
        .await
        .unwrap();

    let mails = memory.mails();
    assert!(!mails.is_empty());
    for mail in mails {
        assert!(mail.ends_with(b"\r\none\r\n.two\r\n"), "{mail:?}");
    }
}

// The process, driven by swaks.

struct Process {
    smtp: Example,
    dir: TempDir,
}

impl Process {
    async fn start(args: &[&str]) -> Self {
        let dir = tempfile::tempdir().expect("there is room for files");
        let maildir = dir.path().join("mails");
        let args = [&["--maildir", maildir.to_str().expect("it is text")], args].concat();
        Self {
            smtp: Example::start("smtp", &args).await,
            dir,
        }
    }

    /// Sends a mail with swaks. Returns whether it succeeded, and its transcript, or `None` if
    /// swaks is not installed.
    async fn swaks(&self, args: &[&str]) -> Option<(bool, String)> {
        let mut swaks = Program::new("swaks");
        swaks
            .args(["--server", &self.smtp.addr().to_string()])
            .args(["--to", "you@example.com", "--from", "me@example.com"])
            .args(["--helo", "me", "--timeout", "15"])
            .args(args)
            .env("HOME", self.dir.path()) // no configuration of the user's
            .kill_on_drop(true);
        match soon("swaks", swaks.output()).await {
            Ok(output) => {
                let said = String::from_utf8_lossy(&output.stdout).into_owned();
                Some((output.status.success(), said))
            }
            Err(err) => {
                assert!(
                    std::env::var_os("CI").is_none(),
                    "swaks is not installed, and CI must not skip what needs it: {err}"
                );
                eprintln!("skipped: swaks is not installed");
                None
            }
        }
    }

    fn mails(&self) -> Vec<Vec<u8>> {
        let mails = files(&self.dir.path().join("mails"), "new");
        mails
            .into_iter()
            .map(|path| std::fs::read(path).expect("it can be read"))
            .collect()
    }

    /// Writes lines to a file in swaks' form. Returns the name of that file for swaks, and the text
    /// that must arrive.
    fn data(&self, lines: &[String]) -> (String, Vec<u8>) {
        let path = self.dir.path().join("data");
        std::fs::write(&path, lines.join("\n")).expect("there is room for a file");
        let meant = lines.join("\r\n") + "\r\n";
        (format!("@{}", path.display()), meant.into_bytes())
    }
}

#[tokio::test]
async fn the_address_of_a_client_is_a_literal_as_the_standard_writes_it() {
    let process = Process::start(&["--proxy-from", "127.0.0.0/8"]).await;
    for (header, literal) in [
        ("TCP4 192.0.2.7 192.0.2.1", "[192.0.2.7]"),
        ("TCP6 2001:db8::7 2001:db8::1", "[IPv6:2001:db8::7]"),
    ] {
        let mut client = Socket::connect(process.smtp.addr()).await;
        let session = format!("PROXY {header} 50000 25\r\n{ENVELOPE}x\r\n.\r\nQUIT\r\n");
        client.send(session).await;
        client.rest().await;

        let trace = format!("Received: from me ({literal})\r\n");
        let mails = process.mails();
        let found = mails
            .iter()
            .any(|mail| String::from_utf8_lossy(mail).contains(&trace));
        assert!(found, "{literal}: {mails:?}");
    }
}

#[tokio::test]
async fn swaks_delivers_a_mail_plain() {
    let process = Process::start(&[]).await;
    let lines = ["Subject: x", "", "one", ".", "..two", ""].map(str::to_owned);
    let (data, meant) = process.data(&lines);

    let Some((content, said)) = process.swaks(&["--data", &data]).await else {
        return;
    };

    assert!(content, "{said}");
    let mails = process.mails();
    assert_eq!(mails.len(), 1);
    assert!(
        mails[0].ends_with(&meant),
        "{}",
        String::from_utf8_lossy(&mails[0])
    );
}

#[tokio::test]
async fn swaks_delivers_a_mail_pipelined() {
    let process = Process::start(&[]).await;

    let Some((content, said)) = process.swaks(&["--pipeline"]).await else {
        return;
    };

    assert!(content, "{said}");
    let last = said.find(" -> DATA").expect("it says so");
    let first = said.find("<-  250 OK").expect("it says so");
    assert!(last < first, "it did not pipeline: {said}");
    assert_eq!(process.mails().len(), 1);
}

#[tokio::test]
async fn swaks_delivers_a_mail_over_starttls() {
    let process = Process::start(&[]).await;

    let Some((content, said)) = process.swaks(&["-tls"]).await else {
        return;
    };

    assert!(content, "{said}");
    assert!(said.contains("=== TLS started"), "{said}");
    let mails = process.mails();
    assert_eq!(mails.len(), 1);
    let mail = String::from_utf8_lossy(&mails[0]);
    assert!(mail.contains("with ESMTPS;"), "{mail}");
}

#[tokio::test]
async fn swaks_delivers_ten_megabytes_whole() {
    let process = Process::start(&[]).await;
    let header = ["Subject: x", ""].map(str::to_owned);
    let text = (0..100_000).map(|n| {
        let dot = if n % 7 == 0 { "." } else { "" };
        format!("{dot}{n:09} {}", "x".repeat(95))
    });
    let lines: Vec<_> = header.into_iter().chain(text).collect();
    let (data, meant) = process.data(&lines);
    assert!(meant.len() > 10_000_000);

    let Some((content, said)) = process.swaks(&["--data", &data, "--suppress-data"]).await else {
        return;
    };

    assert!(content, "{said}");
    let mails = process.mails();
    assert_eq!(mails.len(), 1);
    assert!(mails[0].ends_with(&meant));
    assert!(mails[0].len() < meant.len() + 1000);
}

#[tokio::test]
async fn swaks_is_told_that_a_mail_is_too_large() {
    let process = Process::start(&["--max-size", "1000000"]).await;
    let lines = vec!["x".repeat(98); 20_000];
    let (data, _) = process.data(&lines);

    let Some((content, said)) = process.swaks(&["--data", &data, "--suppress-data"]).await else {
        return;
    };

    assert!(!content, "{said}");
    assert!(said.contains("<** 552 "), "{said}");
    assert!(said.contains("<-  221 "), "the session went on: {said}");
    assert!(process.mails().is_empty());
    assert!(files(&process.dir.path().join("mails"), "tmp").is_empty());
}

#[tokio::test]
async fn a_process_that_is_told_to_end_says_so_to_its_clients() {
    let process = Process::start(&[]).await;
    let mut idle = Socket::connect(process.smtp.addr()).await;
    assert_eq!(idle.line().await, "220 localhost ESMTP");
    let mut busy = Socket::connect(process.smtp.addr()).await;
    busy.send(ENVELOPE).await;
    while !busy.line().await.starts_with("354") {}
    let Process { smtp, dir } = process;

    let ended = tokio::spawn(smtp.stop());

    busy.send("x\r\n.\r\n").await;
    assert!(busy.line().await.starts_with("250 "));
    assert!(busy.rest().await.starts_with(b"421 "));
    assert!(idle.rest().await.starts_with(b"421 "));
    drop((busy, idle));
    let ended = ended.await.unwrap();
    assert!(ended.status.success());
    assert!(ended.said.last().unwrap().ends_with(", 0 aborted"));
    assert_eq!(files(&dir.path().join("mails"), "new").len(), 1);
}
