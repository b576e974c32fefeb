//! The task that feeds one group.

use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;

use tokio::sync::watch;
use tokio::task::{AbortHandle, Id};

use crate::error::BoxError;

/// The error of [`Groups::join`](super::Groups::join): the group's feed could not be opened, or the
/// group ended before its feed was open. The [`source`](StdError::source) of this error is the
/// error of the function that opens the feed, if that function returned one. All tasks that waited
/// for the feed get the same source.
#[derive(Clone, Debug)]
pub struct JoinError {
    cause: Option<Arc<dyn StdError + Send + Sync>>,
}

impl fmt::Display for JoinError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the group could not be opened")
    }
}

impl StdError for JoinError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.cause.as_deref().map(|cause| cause as _)
    }
}

type Opened = Result<(), JoinError>;

/// The running task of a group's feed. Dropping the value ends the task.
pub(super) struct Feed {
    task: AbortHandle,
    opening: Opening,
}

impl Feed {
    /// Spawns the task.
    pub(super) fn start<F>(feeding: impl FnOnce(Outcome) -> F) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let (outcome, opening) = watch::channel(None);
        Self {
            task: tokio::spawn(feeding(Outcome(outcome))).abort_handle(),
            opening: Opening(opening),
        }
    }

    pub(super) fn id(&self) -> Id {
        self.task.id()
    }

    pub(super) fn opening(&self) -> Opening {
        self.opening.clone()
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Reports the outcome of opening a feed. Owned by the feed's task.
pub(super) struct Outcome(watch::Sender<Option<Opened>>);

impl Outcome {
    /// Reports to all waiting tasks that the feed is open, or the error with which opening failed.
    pub(super) fn report(&self, opened: Result<(), BoxError>) {
        let opened = opened.map_err(|why| JoinError {
            cause: Some(Arc::from(why)),
        });
        self.0.send_replace(Some(opened));
    }
}

/// Waits for the outcome of opening a feed.
#[derive(Clone)]
pub(super) struct Opening(watch::Receiver<Option<Opened>>);

impl Opening {
    /// Waits until the feed is open, or opening has failed.
    pub(super) async fn done(mut self) -> Opened {
        match self.0.wait_for(Option::is_some).await {
            Ok(opened) => opened.clone().unwrap_or(Ok(())),
            // The task panicked, was dropped with its runtime, or stopped early because the group
            // has ended.
            Err(_dropped) => Err(JoinError { cause: None }),
        }
    }
}
