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

use crate::member::{Member, farewell};
use crate::rooms::Rooms;

/// The maximum length of a line in bytes, including its ending: more than anyone types.
const MAX_LINE: usize = 1024;

/// Serves the members of a node.
pub(crate) fn chat<Io>(rooms: Arc<Rooms>, node: Arc<str>) -> impl ConnectionService<Io> + Clone
where
    Io: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let make = service_fn(move |peer| {
        Member::begin(Arc::clone(&rooms), Arc::clone(&node), peer).map_ok(SessionService::new)
    });
    Pipeline::new(|| Lines::default().max_line(MAX_LINE))
        .make_service(make)
        .limits(Limits::default().max_frame(MAX_LINE))
        .deadlines(Deadlines::default().idle(Duration::from_secs(600)))
        .farewell(|_, reason| farewell(reason))
}
