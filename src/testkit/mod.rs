//! Runs a whole server in a test: in memory or on sockets, in real time or on a paused clock.
//!
//! [`serve`] runs a connection stack in memory. It returns a [`Served`], which connects clients,
//! contains the server's [`Handle`](crate::Handle), and reports how connections end:
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
//! // The client uses the server's codec.
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
//! A test need not wait for deadlines in real time. Under `#[tokio::test(start_paused = true)]`,
//! the clock jumps to the next deadline whenever nothing else can run. So a test that awaits the
//! end of an idle connection is done at once, although more than a minute passes on the clock.
//!
//! # Other servers
//!
//! [`serve_with`] runs a server with options, with your own listener, or on real sockets.
//! [`memory`] creates the listener and the connector that [`serve`] uses; [`memory_with_buffer`]
//! creates them with another buffer size.
//!
//! [`faults`] checks a whole server under each [`Fault`](faults::Fault) of a connection.
//!
//! To control each reply of the service from the test, use the service of `tower_test::mock`.

pub mod faults;
mod memory;
mod served;

pub use memory::{Connector, MemoryListener, memory, memory_with_buffer};
pub use served::{Served, serve, serve_with};
