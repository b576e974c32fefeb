//! The service of a connection: a pipeline in the clear, and behind STARTTLS (RFC 3207) a second one within TLS.
//!
//! The second knows nothing of what was said to the first: its codec, its session and its peer are new. And what a client, or somebody on the
//! way to it, sent in the clear behind STARTTLS never gets there.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Mutex;
use tower::{Service, ServiceBuilder, service_fn};
use tower_tcp::pipeline::{Event, Limits, Upgrade};
use tower_tcp::preconnect::{PreConnectExt, PreConnectLayer};
use tower_tcp::tls::Tls;
use tower_tcp::{BoxError, Connection, EndReason, Peer, Pipeline, Reply, Rewind};

use super::answer::Answer;
use super::codec::{Input, Smtp};
use super::command::Command;
use super::session::{Leave, Session, Shared};

/// How long a client may take for its next command, or the next piece of its mail (RFC 5321, section 4.5.3.2.7).
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
    let limits = Limits::default()
        .first_byte(PATIENCE)
        .frame(PATIENCE)
        .idle(PATIENCE);

    let everybody = Arc::clone(&shared);
    let greet = service_fn(move |peer: Peer<Answer, Leave>| {
        let shared = Arc::clone(&everybody);
        async move {
            let banner = Answer::new(220, format!("{} ESMTP", shared.hostname));
            peer.send(banner).await?;
            let session = Arc::new(Mutex::new(Session::new(shared, &peer, false)?));
            Ok::<_, BoxError>(service_fn(move |event| {
                in_the_clear(session.clone(), event)
            }))
        }
    });

    let make_secured = service_fn(move |peer: Peer<Answer, Leave>| {
        let shared = Arc::clone(&shared);
        async move {
            let session = Arc::new(Mutex::new(Session::new(shared, &peer, true)?));
            Ok::<_, BoxError>(service_fn(move |event| secured(session.clone(), event)))
        }
    });
    let secured = ServiceBuilder::new()
        .layer(PreConnectLayer::new(
            service_fn(nothing_injected::<Io>).chain(tls),
        ))
        .service(
            Pipeline::new(Smtp::default)
                .make_event_service(make_secured)
                .limits(limits.clone()),
        );

    Pipeline::new(Smtp::default)
        .make_event_service(greet)
        .limits(limits)
        .on_upgrade(secured)
}

/// Nobody waits for the lock: a connection's events come one at a time.
async fn in_the_clear(
    session: Arc<Mutex<Session>>,
    event: Event<Input, Leave>,
) -> Result<Upgrade<Answer>, BoxError> {
    if let Event::Request(Input::Command(Ok(Command::StartTls))) = event {
        return Ok(Reply::from(Answer::new(220, "Go ahead")).upgrade());
    }
    Ok(session.lock().await.on(event).await.into())
}

async fn secured(
    session: Arc<Mutex<Session>>,
    event: Event<Input, Leave>,
) -> Result<Reply<Answer>, BoxError> {
    Ok(session.lock().await.on(event).await)
}

/// Turns a client away that did not wait for the handshake: what came behind STARTTLS came in the clear, from whomever (CVE-2011-0411).
async fn nothing_injected<Io>(
    conn: Connection<Rewind<Io>>,
) -> Result<Connection<Rewind<Io>>, BoxError> {
    if conn.get_ref().buffered().is_empty() {
        Ok(conn)
    } else {
        Err("commands were sent behind STARTTLS, before the handshake".into())
    }
}
