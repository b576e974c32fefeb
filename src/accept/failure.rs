use std::io;

use rustix::io::Errno;

use crate::bind::ListenerClosed;
use crate::error::find_cause;

/// The accept loop's reaction to a failed accept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum AcceptErrorAction {
    /// Accepts the next connection at once, because the error concerns only the connection that
    /// failed, or because a signal interrupted the accept.
    ///
    /// Each of the first 16 such failures since the last successful accept is retried immediately.
    /// After each further failure of this kind the loop backs off, so that no error makes it spin.
    Retry,
    /// Waits before the next accept, because a resource is exhausted or the error is unknown.
    ///
    /// Meanwhile, new connections stay in the backlog. The first wait is 5 ms, and each further
    /// wait is twice as long as the previous one, up to 1 s. A wait ends early when one of the
    /// server's own connections ends. Only the first wait since the last successful accept is
    /// logged.
    BackOff,
    /// Drains the server, because the listener will not accept again. The server then returns the
    /// error.
    Stop,
}

impl AcceptErrorAction {
    /// Returns the value of the metric attribute `action`. It does not change between releases.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Retry => "retry",
            Self::BackOff => "back_off",
            Self::Stop => "stop",
        }
    }
}

/// Returns the name of an error for OpenTelemetry's `error.type`: the errno symbol in lower case,
/// or `_OTHER` for an error that is not listed here.
pub(crate) fn error_type(err: &io::Error) -> &'static str {
    let Some(errno) = Errno::from_io_error(err) else {
        return "_OTHER";
    };
    match errno {
        Errno::BADF => "ebadf",
        Errno::CONNABORTED => "econnaborted",
        Errno::CONNREFUSED => "econnrefused",
        Errno::CONNRESET => "econnreset",
        Errno::HOSTDOWN => "ehostdown",
        Errno::HOSTUNREACH => "ehostunreach",
        Errno::INTR => "eintr",
        Errno::INVAL => "einval",
        Errno::MFILE => "emfile",
        Errno::NETDOWN => "enetdown",
        Errno::NETUNREACH => "enetunreach",
        Errno::NFILE => "enfile",
        Errno::NOBUFS => "enobufs",
        Errno::NOMEM => "enomem",
        Errno::NOPROTOOPT => "enoprotoopt",
        Errno::NOTSOCK => "enotsock",
        Errno::OPNOTSUPP => "eopnotsupp",
        Errno::PERM => "eperm",
        Errno::PROTO => "eproto",
        Errno::TIMEDOUT => "etimedout",
        #[cfg(target_os = "linux")]
        Errno::NONET => "enonet",
        _ => "_OTHER",
    }
}

/// Decides how to react to a failed accept. This is the default policy.
///
/// It retries if the error concerns only the *new* connection, such as a network error that was
/// pending on that connection ([accept(2)] describes such errors for Linux), or if a signal
/// interrupted the accept. It stops if the listener is closed ([`ListenerClosed`], `EBADF` or
/// `ENOTSOCK`). It backs off if a resource is exhausted, and after every other error, so that an
/// unknown error neither ends a server nor makes it spin.
///
/// [accept(2)]: https://man7.org/linux/man-pages/man2/accept.2.html
pub fn classify(err: &io::Error) -> AcceptErrorAction {
    if find_cause::<ListenerClosed>(err).is_some() {
        return AcceptErrorAction::Stop;
    }
    let Some(errno) = Errno::from_io_error(err) else {
        return match err.kind() {
            io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::Interrupted
            | io::ErrorKind::TimedOut => AcceptErrorAction::Retry,
            _ => AcceptErrorAction::BackOff,
        };
    };
    match errno {
        Errno::CONNABORTED
        | Errno::CONNREFUSED
        | Errno::CONNRESET
        | Errno::HOSTDOWN
        | Errno::HOSTUNREACH
        | Errno::INTR
        | Errno::NETDOWN
        | Errno::NETUNREACH
        | Errno::NOPROTOOPT
        | Errno::OPNOTSUPP
        | Errno::PERM
        | Errno::PROTO
        | Errno::TIMEDOUT => AcceptErrorAction::Retry,
        #[cfg(target_os = "linux")]
        Errno::NONET => AcceptErrorAction::Retry,
        Errno::BADF | Errno::NOTSOCK => AcceptErrorAction::Stop,
        // MFILE, NFILE, NOBUFS, NOMEM, and every other error. INVAL does not mean a closed listener
        // here, because `Sockets` returns `ListenerClosed` for a socket that no longer listens.
        _ => AcceptErrorAction::BackOff,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_error_of_accept_falls_in_its_kind() {
        use AcceptErrorAction::{BackOff, Retry, Stop};
        let table = [
            (Errno::CONNABORTED, Retry),
            (Errno::CONNREFUSED, Retry),
            (Errno::CONNRESET, Retry),
            (Errno::HOSTDOWN, Retry),
            (Errno::HOSTUNREACH, Retry),
            (Errno::INTR, Retry),
            (Errno::NETDOWN, Retry),
            (Errno::NETUNREACH, Retry),
            (Errno::NOPROTOOPT, Retry),
            (Errno::OPNOTSUPP, Retry),
            (Errno::PERM, Retry),
            (Errno::PROTO, Retry),
            (Errno::TIMEDOUT, Retry),
            (Errno::MFILE, BackOff),
            (Errno::NFILE, BackOff),
            (Errno::NOBUFS, BackOff),
            (Errno::NOMEM, BackOff),
            (Errno::INVAL, BackOff),
            (Errno::IO, BackOff),
            (Errno::FAULT, BackOff),
            (Errno::BADF, Stop),
            (Errno::NOTSOCK, Stop),
        ];
        for (errno, action) in table {
            assert_eq!(classify(&errno.into()), action, "{errno}");
        }
        let closed = io::Error::other(ListenerClosed);
        assert_eq!(classify(&closed), Stop);
        assert_eq!(classify(&io::Error::other("who knows")), BackOff);
        assert_eq!(classify(&io::ErrorKind::ConnectionAborted.into()), Retry);
    }
}
