//! The errors that cross rooms: the boxed one at service boundaries, and the server's own.

use std::error::Error as StdError;
use std::io;

use thiserror::Error;

/// Any error, boxed: what services of a connection stack fail with, as everywhere in Tower.
pub type BoxError = Box<dyn StdError + Send + Sync>;

/// Returns the first error of type `E` in the chain of causes that begins with `err` itself.
///
/// ```
/// use std::io;
/// use tower_tcp::error::find_cause;
///
/// let denied = io::Error::from_raw_os_error(13);
/// let wrapped = tower_tcp::Error::Accept(denied);
/// assert_eq!(find_cause::<io::Error>(&wrapped).and_then(io::Error::raw_os_error), Some(13));
/// ```
pub fn find_cause<'a, E: StdError + 'static>(err: &'a (dyn StdError + 'static)) -> Option<&'a E> {
    let mut next = Some(err);
    while let Some(err) = next {
        if let Some(found) = err.downcast_ref::<E>() {
            return Some(found);
        }
        // `io::Error` hides what it was made from: its `source()` is the *source of* that error.
        let inner = err.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        next = match inner {
            Some(inner) => Some(inner),
            None => err.source(),
        };
    }
    None
}

/// Why a [`Server`](crate::Server) could not listen, or had to stop.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// An address could not be resolved, bound or listened on. None of the others is left bound.
    #[error("cannot listen on {address}")]
    Bind {
        /// The address as it was given.
        address: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },

    /// A listener failed for good, or the accept-error policy said to stop.
    ///
    /// Connections that were open were drained before this was returned.
    #[error("the listener failed")]
    Accept(#[source] io::Error),

    /// The connection stack's `poll_ready` failed: in Tower's terms the service is dead.
    ///
    /// Connections that were open were drained before this was returned.
    #[error("the connection service failed")]
    Service(#[source] BoxError),

    /// A thread that connections were to run on could not be started, or of the runtimes that they were to run on all were shut down.
    #[error("the workers failed")]
    Workers(#[source] io::Error),
}

/// A caught panic of user code, as an error.
#[derive(Debug, Error)]
#[error("panicked: {message}")]
pub struct Panicked {
    message: String,
}

impl Panicked {
    /// Takes the message out of what `catch_unwind` caught.
    pub(crate) fn new(payload: &(dyn std::any::Any + Send)) -> Self {
        let message = payload
            .downcast_ref::<&str>()
            .map(|text| (*text).to_owned())
            .or_else(|| payload.downcast_ref::<String>().cloned())
            .unwrap_or_else(|| "something that is not text".to_owned());
        Self { message }
    }
}
