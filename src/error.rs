//! The errors that several modules share: the boxed error at service boundaries, the error of a
//! server, and the error of a caught panic.

use std::any::Any;
use std::error::Error as StdError;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};

use thiserror::Error;

/// A boxed error: the error type of this crate's connection services. It is the same type as
/// tower's `BoxError`.
pub type BoxError = Box<dyn StdError + Send + Sync>;

#[expect(unnameable_types, reason = "sealed: an alias of a bound")]
mod sealed {
    use super::BoxError;

    /// An error type that converts into a [`BoxError`].
    ///
    /// The trait is an alias of the bound `Into<BoxError>`. Because of the alias, the compiler's
    /// message can ask for an implementation of `std::error::Error` instead of `Into`.
    #[diagnostic::on_unimplemented(
        message = "`{Self}` is not an error that a service or a codec may fail with",
        label = "`{Self}` does not convert into `BoxError`",
        note = "implement `std::error::Error` for it (with `Send + Sync`), or fail with a \
            `BoxError`"
    )]
    pub trait ServiceError: Into<BoxError> {}

    #[diagnostic::do_not_recommend]
    impl<E: Into<BoxError>> ServiceError for E {}
}
pub(crate) use sealed::ServiceError;

/// Returns the first error of type `E` in a chain of causes. The chain begins with `err` itself.
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
        // `io::Error` skips the error it wraps: its `source()` is the *source of* that error.
        let inner = err.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        next = match inner {
            Some(inner) => Some(inner),
            None => err.source(),
        };
    }
    None
}

/// The error of a [`Server`](crate::Server) that could not start, or stopped because of a failure.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// An address is invalid, or could not be resolved, bound or listened on, or no address was
    /// given. No address is left bound.
    #[error("cannot listen on {address}")]
    Bind {
        /// The text of the [`Endpoint`](crate::bind::Endpoint). If no endpoint was given, it is
        /// `no address`.
        address: String,
        /// The cause, such as an error of the system or the resolver, or a wrapped
        /// [`InvalidEndpoint`](crate::bind::InvalidEndpoint) or
        /// [`PassedError`](crate::bind::PassedError).
        #[source]
        source: io::Error,
    },

    /// The listener failed permanently, or the accept-error policy returned
    /// [`Stop`](crate::accept::AcceptErrorAction::Stop).
    ///
    /// Before the server returned this error, it drained the open connections, and aborted those
    /// still open at the shutdown deadline.
    #[error("the listener failed")]
    Accept(#[source] io::Error),

    /// The `poll_ready` of the connection stack failed. After that, Tower does not allow further
    /// calls.
    ///
    /// Before the server returned this error, it drained the open connections, and aborted those
    /// still open at the shutdown deadline.
    #[error("the connection service failed")]
    Service(#[source] BoxError),

    /// A worker thread could not be started. This is also the error if all runtimes passed to
    /// [`ServerBuilder::runtimes`](crate::ServerBuilder::runtimes) were shut down, or if the runtime
    /// of the server itself was shut down.
    #[error("the workers failed")]
    Workers(#[source] io::Error),
}

/// A panic of user code, caught and turned into an error.
#[derive(Debug, Error)]
#[error("panicked: {message}")]
pub struct Panicked {
    message: String,
}

impl Panicked {
    /// Extracts the message from the payload of a caught panic, and drops the payload.
    #[cold]
    #[expect(
        clippy::mem_forget,
        reason = "a payload whose drop panics can only be leaked"
    )]
    pub(crate) fn new(payload: Box<dyn Any + Send>) -> Self {
        let message = payload
            .downcast_ref::<&str>()
            .map(|text| (*text).to_owned())
            .or_else(|| payload.downcast_ref::<String>().cloned())
            .unwrap_or_else(|| "something that is not text".to_owned());
        // The payload is a value of user code, so dropping it may panic, too. Dropping the payload
        // of that second panic could cause a third one, and so on. So the second payload is leaked.
        if let Err(again) = catch_unwind(AssertUnwindSafe(|| drop(payload))) {
            std::mem::forget(again);
        }
        Self { message }
    }
}

/// Runs user code and catches a panic in it. If dropping the panic's payload panics, that second
/// panic is caught as well.
///
/// If the code panics, it may leave values half changed. Such a value must not be used again,
/// except to drop it.
#[inline]
pub(crate) fn caught<R>(code: impl FnOnce() -> R) -> Result<R, Panicked> {
    catch_unwind(AssertUnwindSafe(code)).map_err(Panicked::new)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A panic payload. Dropping it panics with `Again(n - 1)`, unless its number `n` is zero.
    struct Again(u32);

    impl Drop for Again {
        fn drop(&mut self) {
            if self.0 > 0 {
                std::panic::panic_any(Self(self.0 - 1));
            }
        }
    }

    #[test]
    fn a_panic_while_a_payload_is_dropped_is_caught() {
        for times in 0..3 {
            let panicked = caught(|| std::panic::panic_any(Again(times))).expect_err("it panics");

            assert_eq!(panicked.to_string(), "panicked: something that is not text");
        }
    }
}
