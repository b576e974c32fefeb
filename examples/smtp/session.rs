//! The session of one client: which command is allowed when, and its reply (RFC 5321, section 4).

use std::convert::Infallible;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;

use bytes::Bytes;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc2822;
use tokio::sync::{OwnedRwLockReadGuard, RwLock, RwLockWriteGuard};
use tower_tcp::pipeline::Session;
use tower_tcp::{EndReason, Peer, Reply};

use super::answer::{Answer, GO_AHEAD};
use super::codec::{Flaw, Input};
use super::command::Command;
use super::store::{Draft, Store};

/// The maximum number of recipients of a mail: the smallest limit that RFC 5321 allows (section
/// 4.5.3.1.8).
pub(crate) const MAX_RECIPIENTS: usize = 100;

/// The number of mistakes after which the connection is closed: more than a confused client makes,
/// and few for an attacker.
pub(crate) const MAX_MISTAKES: usize = 10;

/// The code of the answer after which the server closes the connection without a QUIT (RFC 5321,
/// section 3.8).
const LEAVES: u16 = 421;

/// The state that all sessions share.
pub(crate) struct Shared {
    pub(crate) hostname: String,
    /// The maximum size of a mail, in octets.
    pub(crate) max_size: u64,
    pub(crate) store: Store,
    /// Each incoming mail holds a read lock.
    mails: Arc<RwLock<()>>,
}

impl Shared {
    pub(crate) fn new(hostname: String, max_size: u64, store: Store) -> Self {
        Self {
            hostname,
            max_size,
            store,
            mails: Arc::default(),
        }
    }

    /// Waits until no mail is being received. From this call on, no new mail is accepted until the
    /// returned guard is dropped.
    pub(crate) async fn finish_mails(&self) -> RwLockWriteGuard<'_, ()> {
        self.mails.write().await
    }
}

pub(crate) struct SmtpSession {
    shared: Arc<Shared>,
    client: Client,
    transaction: Transaction,
    mistakes: usize,
}

/// The facts about the client.
struct Client {
    address: String,
    secured: bool,
    hello: Option<Hello>,
}

struct Hello {
    name: String,
    extended: bool,
}

enum Transaction {
    None,
    Begun {
        from: String,
        to: Vec<String>,
    },
    /// The mail is being received. If it cannot be stored, `draft` is the answer to send after the
    /// end of the mail.
    Text {
        draft: Result<Draft, Answer>,
        size: u64,
        coming_in: OwnedRwLockReadGuard<()>,
    },
}

impl Session<Input> for SmtpSession {
    type Reply = Reply<Answer>;
    type Error = Infallible;

    async fn call(&mut self, input: Input) -> Result<Reply<Answer>, Infallible> {
        let quits = input == Input::Command(Ok(Command::Quit));
        let answer = match input {
            Input::Command(Ok(command)) => Some(self.command(command).await),
            Input::Command(Err(answer)) => Some(answer),
            Input::Text(text) => {
                self.text(text).await;
                None
            }
            Input::EndOfText(end) => Some(self.end_of_text(end).await),
        };
        let Some(answer) = answer else {
            return Ok(Reply::none());
        };
        self.mistakes += usize::from(is_mistake(&answer));
        Ok(if self.mistakes >= MAX_MISTAKES {
            Reply::from(vec![answer, Answer::new(LEAVES, "Too many mistakes")]).close()
        } else if quits || answer.code == LEAVES {
            Reply::from(answer).close()
        } else {
            answer.into()
        })
    }
}

impl SmtpSession {
    pub(crate) fn new(shared: Arc<Shared>, peer: &Peer<Answer>, secured: bool) -> Self {
        let address = peer.info().client_addr();
        let client = Client {
            address: address
                .tcp()
                .map_or_else(|| address.to_string(), |addr| literal(addr.ip())),
            secured,
            hello: None,
        };
        Self {
            shared,
            client,
            transaction: Transaction::None,
            mistakes: 0,
        }
    }

    async fn command(&mut self, command: Command) -> Answer {
        match command {
            Command::Hello { client, extended } => self.hello(client, extended),
            Command::Mail { from, size } => self.mail(from, size),
            Command::Recipient(to) => self.recipient(to),
            Command::Data => self.data().await,
            Command::Reset => {
                self.transaction = Transaction::None;
                Answer::new(250, "OK")
            }
            // The server does not tell strangers which mailboxes it has (RFC 5321, section 7.3).
            Command::Verify => Answer::new(252, "Send a mail, and see"),
            Command::Help => Answer::new(214, "RFC 5321"),
            Command::Noop => Answer::new(250, "OK"),
            // Before TLS, `InTheClear` handles this command.
            Command::StartTls => out_of_order("TLS is on"),
            Command::Quit => Answer::new(221, "Bye"),
        }
    }

    fn hello(&mut self, name: String, extended: bool) -> Answer {
        self.transaction = Transaction::None;
        let answer = Answer::new(250, format!("{} greets {name}", self.shared.hostname));
        self.client.hello = Some(Hello { name, extended });
        if !extended {
            return answer;
        }
        let answer = answer
            .line("PIPELINING")
            .line(format!("SIZE {}", self.shared.max_size))
            .line("8BITMIME")
            .line("HELP");
        if self.client.secured {
            answer
        } else {
            answer.line("STARTTLS")
        }
    }

    fn mail(&mut self, from: String, size: Option<u64>) -> Answer {
        if self.client.hello.is_none() {
            return out_of_order("EHLO first");
        }
        if !matches!(self.transaction, Transaction::None) {
            return out_of_order("A mail is begun already");
        }
        if size.is_some_and(|size| size > self.shared.max_size) {
            return too_large();
        }
        self.transaction = Transaction::Begun {
            from,
            to: Vec::new(),
        };
        Answer::new(250, "OK")
    }

    fn recipient(&mut self, recipient: String) -> Answer {
        let Transaction::Begun { to, .. } = &mut self.transaction else {
            return out_of_order("MAIL first");
        };
        if to.len() >= MAX_RECIPIENTS {
            return Answer::new(452, "Too many recipients");
        }
        to.push(recipient);
        Answer::new(250, "OK")
    }

    async fn data(&mut self) -> Answer {
        let Transaction::Begun { from, to } = &self.transaction else {
            return out_of_order("MAIL first");
        };
        if to.is_empty() {
            // A client that pipelines learns here that no recipient was accepted (RFC 5321, 3.3).
            return Answer::new(554, "No recipients");
        }
        let Ok(coming_in) = Arc::clone(&self.shared.mails).try_read_owned() else {
            return farewell(EndReason::Drained);
        };
        let header = self.client.header(from, to, &self.shared.hostname);
        let draft = async {
            let mut draft = self.shared.store.begin().await?;
            draft.write(header.into()).await?;
            Ok(draft)
        };
        match draft.await {
            Ok(draft) => {
                self.transaction = Transaction::Text {
                    draft: Ok(draft),
                    size: 0,
                    coming_in,
                };
                Answer::new(GO_AHEAD, "Go ahead, to the end: CRLF.CRLF")
            }
            Err(err) => failed(&err),
        }
    }

    async fn text(&mut self, text: Bytes) {
        let Transaction::Text { draft, size, .. } = &mut self.transaction else {
            return;
        };
        *size += text.len() as u64;
        let Ok(writing) = draft else {
            return;
        };
        if *size > self.shared.max_size {
            *draft = Err(too_large());
        } else if let Err(err) = writing.write(text).await {
            *draft = Err(failed(&err));
        }
    }

    async fn end_of_text(&mut self, end: Result<(), Flaw>) -> Answer {
        let transaction = std::mem::replace(&mut self.transaction, Transaction::None);
        let Transaction::Text {
            draft, coming_in, ..
        } = transaction
        else {
            return out_of_order("DATA first");
        };
        if let Err(flaw) = end {
            return Answer::new(
                554,
                match flaw {
                    Flaw::BareLineBreak => "Lines end with CRLF, and have neither within",
                    Flaw::LongLine => "A line is longer than 1000 octets",
                },
            );
        }
        let draft = match draft {
            Ok(draft) => draft,
            Err(answer) => return answer,
        };
        let kept = draft.keep().await;
        drop(coming_in);
        match kept {
            Ok(()) => Answer::new(250, "OK, kept"),
            Err(err) => failed(&err),
        }
    }
}

impl Client {
    /// Returns the lines that a server adds to the front of a mail (RFC 5321, section 4.4),
    /// including one for each recipient.
    fn header(&self, from: &str, to: &[String], hostname: &str) -> String {
        let (name, extended) = match &self.hello {
            Some(hello) => (hello.name.as_str(), hello.extended),
            None => ("unknown", false),
        };
        let protocol = match (extended, self.secured) {
            (false, _) => "SMTP",
            (true, false) => "ESMTP",
            (true, true) => "ESMTPS",
        };
        // Formatting fails only beyond the year 9999.
        let date = OffsetDateTime::now_utc()
            .format(&Rfc2822)
            .unwrap_or_default();
        let address = &self.address;
        let mut header = format!("Return-Path: <{from}>\r\n");
        for to in to {
            header += &format!("Delivered-To: {to}\r\n");
        }
        header += &format!(
            "Received: from {name} ([{address}])\r\n\tby {hostname} with {protocol}; {date}\r\n"
        );
        header
    }
}

/// Returns an address as it is written between brackets in a mail (RFC 5321, section 4.1.3).
fn literal(ip: IpAddr) -> String {
    match ip {
        IpAddr::V4(ip) => ip.to_string(),
        IpAddr::V6(ip) => format!("IPv6:{ip}"),
    }
}

/// Returns the last answer to a client whose connection the server ends.
pub(crate) fn farewell(reason: EndReason) -> Answer {
    let why = match reason {
        EndReason::LimitExceeded => "Too many connections, come back later",
        EndReason::FirstByteTimeout | EndReason::FrameTimeout | EndReason::IdleTimeout => {
            "Silent for too long"
        }
        _ => "Closing down, come back later",
    };
    Answer::new(LEAVES, why)
}

fn is_mistake(answer: &Answer) -> bool {
    matches!(answer.code, 500..=504 | 555)
}

fn out_of_order(first: &'static str) -> Answer {
    Answer::new(503, first)
}

fn too_large() -> Answer {
    Answer::new(552, "Larger than a mail may be")
}

fn failed(err: &io::Error) -> Answer {
    if err.kind() == io::ErrorKind::StorageFull {
        return Answer::new(452, "No room now, come back later");
    }
    tracing::warn!(error = %err, "mail.not_kept");
    Answer::new(451, "Cannot keep it, come back later")
}
