//! A whole server in a test, without sockets and on paused time.
//!
//! [`serve`] runs a connection stack in memory. The value it returns makes connections, has the
//! server's [`Handle`](crate::Handle), and reports how connections end:
//!
//! ```
//! use std::convert::Infallible;
//! use bytes::Bytes;
//! use futures_util::{SinkExt, StreamExt};
//! use tokio_util::codec::Framed;
//! use tower_tcp::{EndReason, Pipeline, frame::Lines, testkit};
//!
//! # #[tokio::main(flavor = "current_thread", start_paused = true)]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let echo = tower::service_fn(|line: Bytes| async move { Ok::<_, Infallible>(line) });
//! let mut served = testkit::serve(Pipeline::new(Lines::default).service(echo));
//!
//! // The server's own codec makes a client of the stream.
//! let mut client = Framed::new(served.connect().await?, Lines::default());
//! client.send("hi".into()).await?;
//! assert_eq!(client.next().await.ok_or("closed")??, "hi");
//!
//! drop(client);
//! assert_eq!(served.ended().await?.reason(), EndReason::PeerClosed);
//! assert_eq!(served.shutdown().await?.aborted, 0);
//! # Ok(())
//! # }
//! ```
//!
//! Deadlines cost a test no time: under `#[tokio::test(start_paused = true)]` the clock jumps to
//! the next deadline whenever nothing else can run, so an idle time of a minute has passed as soon
//! as a test awaits the end it leads to.
//!
//! # Other servers
//!
//! A server with options, with a listener of your own or on real sockets is run by [`serve_with`].
//! [`memory`] makes the listener and the connector that [`serve`] uses; [`memory_with_buffer`]
//! makes them with smaller buffers.
//!
//! To play the *service* by hand and keep the rest real, use `tower_test::mock`.

mod memory;
mod served;

pub use memory::{Connector, MemoryListener, memory, memory_with_buffer};
pub use served::{Served, serve, serve_with};
