//! The service of a connection: a pipeline in the clear, and behind STARTTLS (RFC 3207) a second
//! one within TLS.
//!
//! The second pipeline has a codec, a session and a peer of its own, and so keeps nothing of the
//! first. Bytes that were sent in the clear behind STARTTLS, by the client or by somebody on the
//! way to it, never reach it.

use std::convert::Infallible;
use std::future::ready;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tower::{Service, ServiceBuilder, service_fn};
use tower_tcp::deadline::Deadlines;
use tower_tcp::pipeline::{Event, Session, SessionService, Upgrade};
use tower_tcp::preconnect::{PreConnectExt, PreConnectLayer};
use tower_tcp::tls::Tls;
use tower_tcp::{BoxError, Connection, EndReason, Peer, Pipeline, Reply, Rewind};

use super::answer::Answer;
use super::codec::{Input, Smtp};
use super::command::Command;
use super::session::{Leave, Shared, SmtpSession};

/// How long a client may take for its next command, or the next piece of its mail (RFC 5321,
/// section 4.5.3.2.7).
const PATIENCE: Duration = Duration::from_secs(5 * 60);

pub(crate) fn smtp<Io>(
    shared: Arc<Shared>,
    tls: Tls,
) -> impl Service<
    Connection<Io>,
    Response = EndReason,
    Error = BoxError,
    Future = impl Future<Output = Result<EndReason, BoxError>> + Send + use<Io>,
> + Clone
+ Send
where
    Io: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let deadlines = Deadlines::default()
        .first_byte(PATIENCE)
        .frame(PATIENCE)
        .idle(PATIENCE);

    let everybody = Arc::clone(&shared);
    let greet = service_fn(move |peer: Peer<Answer, Leave>| {
        let shared = Arc::clone(&everybody);
        async move {
            let banner = Answer::new(220, format!("{} ESMTP", shared.hostname));
            peer.send(banner).await?;
            let session = InTheClear(SmtpSession::new(shared, &peer, false)?);
            Ok::<_, BoxError>(SessionService::new(session))
        }
    });

    let make_secured = service_fn(move |peer: Peer<Answer, Leave>| {
        let session = SmtpSession::new(Arc::clone(&shared), &peer, true);
        ready(session.map(SessionService::new))
    });
    let secured = ServiceBuilder::new()
        .layer(PreConnectLayer::new(
            service_fn(nothing_injected::<Io>).chain(tls),
        ))
        .service(
            Pipeline::new(Smtp::default)
                .make_event_service(make_secured)
                .deadlines(deadlines),
        );

    Pipeline::new(Smtp::default)
        .make_event_service(greet)
        .deadlines(deadlines)
        .on_upgrade(secured)
}

/// A session that TLS may take over.
struct InTheClear(SmtpSession);

impl Session<Event<Input, Leave>> for InTheClear {
    type Reply = Upgrade<Answer>;
    type Error = Infallible;

    async fn call(&mut self, event: Event<Input, Leave>) -> Result<Upgrade<Answer>, Infallible> {
        if let Event::Request(Input::Command(Ok(Command::StartTls))) = event {
            return Ok(Reply::from(Answer::new(220, "Go ahead")).upgrade());
        }
        self.0.call(event).await.map(Upgrade::from)
    }
}

/// Rejects a client that did not wait for the handshake: bytes behind STARTTLS came in the clear,
/// from whomever (CVE-2011-0411).
async fn nothing_injected<Io>(
    conn: Connection<Rewind<Io>>,
) -> Result<Connection<Rewind<Io>>, BoxError> {
    if conn.get_ref().buffered().is_empty() {
        Ok(conn)
    } else {
        Err("commands were sent behind STARTTLS, before the handshake".into())
    }
}
