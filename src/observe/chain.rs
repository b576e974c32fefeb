use std::error::Error;
use std::fmt;

/// An error and its causes on one line. Control characters are escaped, because a peer may have
/// sent them.
pub(crate) struct ErrorChain<'a>(pub(crate) &'a (dyn Error + Send + Sync + 'static));

impl fmt::Display for ErrorChain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.to_string().escape_debug())?;
        let mut source = self.0.source();
        while let Some(err) = source {
            write!(f, ": {}", err.to_string().escape_debug())?;
            source = err.source();
        }
        Ok(())
    }
}
