//! The service of one connection: its codec, limits and deadlines.

use std::sync::Arc;
use std::time::Duration;

use futures_util::TryFutureExt;
use tokio::io::{AsyncRead, AsyncWrite};
use tower::service_fn;
use tower_tcp::deadline::Deadlines;
use tower_tcp::frame::Lines;
use tower_tcp::pipeline::{Limits, SessionService};
use tower_tcp::{ConnectionService, Pipeline};

use crate::rooms::Chat;
use crate::session::{Member, farewell};

/// The maximum length of a line in bytes, including its ending: more than anyone types.
const MAX_LINE: usize = 1024;

/// Serves members. A member that is silent for as long as `idle` is disconnected.
pub(crate) fn chat<Io>(chat: Arc<Chat>, idle: Duration) -> impl ConnectionService<Io> + Clone
where
    Io: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let make =
        service_fn(move |peer| Member::begin(Arc::clone(&chat), peer).map_ok(SessionService::new));
    Pipeline::new(|| Lines::default().max_line(MAX_LINE))
        .make_event_service(make)
        .limits(Limits::default().max_frame(MAX_LINE))
        .deadlines(Deadlines::default().first_byte(idle).idle(idle))
        .farewell(|_, reason| farewell(reason))
}
