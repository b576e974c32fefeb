//! The task that feeds one group.

use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;

use tokio::sync::watch;
use tokio::task::{AbortHandle, Id};

use crate::error::BoxError;

/// The error of joining a group whose feed could not be opened. The cause, if there is one, is its
/// [`source`](StdError::source). All tasks that waited for the group get the same cause.
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

/// The running task of a group. Dropping it ends the task.
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

/// The task's side of a feed that is being opened.
pub(super) struct Outcome(watch::Sender<Option<Opened>>);

impl Outcome {
    /// Tells all that wait that the feed is opened, or why not.
    pub(super) fn tell(&self, opened: Result<(), BoxError>) {
        let opened = opened.map_err(|why| JoinError {
            cause: Some(Arc::from(why)),
        });
        self.0.send_replace(Some(opened));
    }
}

/// Tells when a feed is opened, or why it could not be.
#[derive(Clone)]
pub(super) struct Opening(watch::Receiver<Option<Opened>>);

impl Opening {
    /// Waits until the feed is opened.
    pub(super) async fn done(mut self) -> Opened {
        match self.0.wait_for(Option::is_some).await {
            Ok(opened) => opened.clone().unwrap_or(Ok(())),
            // The task panicked, or has ended with the group.
            Err(_dropped) => Err(JoinError { cause: None }),
        }
    }
}
