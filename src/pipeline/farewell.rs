//! The last frame to a peer whose connection the server ends.

use std::fmt;
use std::sync::Arc;

use crate::connection::ConnectionInfo;
use crate::end::EndReason;

type Make<T> = dyn Fn(&ConnectionInfo, EndReason) -> Option<T> + Send + Sync;

/// The function that makes a pipeline's farewells, or `None` if the pipeline sends none.
pub(super) struct Farewell<T>(Option<Arc<Make<T>>>);

impl<T> Farewell<T> {
    pub(super) const fn none() -> Self {
        Self(None)
    }

    pub(super) fn new<R: Into<Option<T>>>(
        make: impl Fn(&ConnectionInfo, EndReason) -> R + Send + Sync + 'static,
    ) -> Self {
        Self(Some(Arc::new(move |info, reason| {
            make(info, reason).into()
        })))
    }

    /// Returns whether the pipeline has a function that makes farewells.
    pub(super) fn is_set(&self) -> bool {
        self.0.is_some()
    }

    /// Makes the farewell of one connection.
    pub(super) fn make(&self, info: &ConnectionInfo, reason: EndReason) -> Option<T> {
        self.0.as_ref()?(info, reason)
    }
}

impl<T> Clone for Farewell<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> fmt::Debug for Farewell<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_set() { "set" } else { "none" })
    }
}
