//! Makes `.layer(hook)` a compiler error that names `PreConnectLayer`.

/// A bound that no type meets.
#[diagnostic::on_unimplemented(
    message = "a hook is not a layer: put it into `PreConnectLayer::new(hook)`",
    label = "a hook in place of a layer",
    note = "`.layer(PreConnectLayer::new(hook))` runs the hook before the service behind it"
)]
#[expect(unnameable_types, reason = "sealed: a bound that nothing meets")]
pub trait BehindPreConnectLayer {}

/// Implements `Layer` for a hook, behind a bound that no type meets.
macro_rules! not_a_layer {
    ($hook:ty $(, $param:ident)*) => {
        #[doc(hidden)]
        impl<S, $($param),*> tower_layer::Layer<S> for $hook
        where
            S: $crate::connection::BehindPreConnectLayer,
        {
            type Service = S;

            fn layer(&self, inner: S) -> S {
                inner
            }
        }
    };
}

pub(crate) use not_a_layer;
