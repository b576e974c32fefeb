//! The current configuration. All clones of a hook share it. `Tls::reload` and `Tls::replace`
//! replace it.

use std::sync::{Arc, PoisonError, RwLock};

use tokio_rustls::rustls::ServerConfig;

use super::names::Names;

/// The settings of a handshake. They are replaced only as a whole.
#[derive(Clone)]
pub(super) struct Configuration {
    pub(super) server: Arc<ServerConfig>,
    /// The certificates by name, or `None` if the configuration was not created by a builder. The
    /// hook looks up the name before rustls does, because rustls cannot send the right alert for an
    /// unknown name.
    pub(super) names: Option<Arc<Names>>,
}

/// The current configuration. Each handshake holds the lock only while it clones two pointers.
#[derive(Clone)]
pub(super) struct Current(Arc<RwLock<Configuration>>);

impl Current {
    pub(super) fn new(configuration: Configuration) -> Self {
        Self(Arc::new(RwLock::new(configuration)))
    }

    pub(super) fn get(&self) -> Configuration {
        self.0
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    pub(super) fn set(&self, new: Configuration) {
        let mut current = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let old = std::mem::replace(&mut *current, new);
        // An old configuration may be large, so it is dropped after unlocking.
        drop(current);
        drop(old);
    }
}
