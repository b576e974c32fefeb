//! The service of a connection: a pipeline without TLS, and after STARTTLS (RFC 3207) a second
//! pipeline within TLS.
//!
//! The second pipeline has a codec, a session and a peer of its own, and so shares no state with
//! the first. Bytes that the client, or an attacker on the path, has sent unencrypted after
//! STARTTLS never reach the second pipeline.

use std::convert::Infallible;
use std::future::ready;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tower::{ServiceBuilder, service_fn};
use tower_tcp::admit::ConnectionLimit;
use tower_tcp::deadline::Deadlines;
use tower_tcp::pipeline::{Session, SessionService, Upgrade};
use tower_tcp::preconnect::{PreConnectExt, PreConnectLayer};
use tower_tcp::tls::Tls;
use tower_tcp::{BoxError, Connection, ConnectionService, Peer, Pipeline, Reply, Rewind};

use super::answer::Answer;
use super::codec::{Input, Smtp};
use super::command::Command;
use super::session::{Shared, SmtpSession, farewell};

/// The deadline for a client's next command, or the next piece of its mail (RFC 5321, section
/// 4.5.3.2.7).
const PATIENCE: Duration = Duration::from_secs(5 * 60);

pub(crate) fn smtp<Io>(
    shared: Arc<Shared>,
    tls: Tls,
    limit: &ConnectionLimit,
) -> impl ConnectionService<Io> + Clone + use<Io>
where
    Io: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let deadlines = Deadlines::default()
        .first_byte(PATIENCE)
        .frame(PATIENCE)
        .idle(PATIENCE);

    let everybody = Arc::clone(&shared);
    let greet = service_fn(move |peer: Peer<Answer>| {
        let shared = Arc::clone(&everybody);
        async move {
            let banner = Answer::new(220, format!("{} ESMTP", shared.hostname));
            peer.send(banner).await?;
            let session = InTheClear(SmtpSession::new(shared, &peer, false));
            Ok::<_, BoxError>(SessionService::new(session))
        }
    });

    let make_secured = service_fn(move |peer: Peer<Answer>| {
        let session = SmtpSession::new(Arc::clone(&shared), &peer, true);
        ready(Ok::<_, Infallible>(SessionService::new(session)))
    });
    let secured = ServiceBuilder::new()
        .layer(PreConnectLayer::new(
            service_fn(nothing_injected::<Io>).chain(tls),
        ))
        .service(
            Pipeline::new(Smtp::default)
                .make_service(make_secured)
                .deadlines(deadlines)
                .farewell(|_, reason| farewell(reason)),
        );

    let smtp = Pipeline::new(Smtp::default)
        .make_service(greet)
        .deadlines(deadlines)
        .farewell(|_, reason| farewell(reason))
        .on_upgrade(secured);
    ServiceBuilder::new()
        .layer(limit.layer().overflow(smtp.reject()))
        .service(smtp)
}

/// The session before TLS. STARTTLS replaces it with a session within TLS.
struct InTheClear(SmtpSession);

impl Session<Input> for InTheClear {
    type Reply = Upgrade<Answer>;
    type Error = Infallible;

    async fn call(&mut self, input: Input) -> Result<Upgrade<Answer>, Infallible> {
        if let Input::Command(Ok(Command::StartTls)) = input {
            return Ok(Reply::from(Answer::new(220, "Go ahead")).upgrade());
        }
        self.0.call(input).await.map(Upgrade::from)
    }
}

/// Rejects a client that did not wait for the handshake. Bytes after STARTTLS arrived unencrypted,
/// so they may come from an attacker (CVE-2011-0411).
async fn nothing_injected<Io>(
    conn: Connection<Rewind<Io>>,
) -> Result<Connection<Rewind<Io>>, BoxError> {
    if conn.get_ref().buffered().is_empty() {
        Ok(conn)
    } else {
        Err("commands were sent behind STARTTLS, before the handshake".into())
    }
}
