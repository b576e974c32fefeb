//! A guide to the library, in chapters of ten minutes or less. Each of its programs is compiled.
//!
//! | chapter | shows |
//! | --- | --- |
//! | [1. Ten lines](ch01_ten_lines) | the smallest server, and what its defaults do |
//! | [2. A protocol of your own](ch02_protocol) | a codec that parses, and bad input |
//! | [3. The state of a connection](ch03_state) | sessions, greetings, facts about the peer |
//! | [4. Pushing and messages](ch04_push) | sending at any time, timers, slow peers |
//! | [5. One to many](ch05_many) | registries, groups and broadcasts |
//! | [6. Which layer goes where](ch06_layers) | the four places for stock layers |
//! | [7. Limits and overload](ch07_limits) | where clients wait, and how to refuse them |
//! | [8. TLS, and where clients come from](ch08_tls) | hooks, the PROXY protocol |
//! | [9. Stopping and replacing](ch09_drain) | drains, farewells, a new version |
//! | [10. HTTP beside your protocol](ch10_http) | HTTP in the same program: an admin port, axum, gRPC |
//! | [11. Testing](ch11_testing) | a whole server in a test, without sockets or waiting, and under faults |
//! | [12. Watching a server](ch12_watching) | spans, metrics, the table of connections |
//! | [13. If you come from elsewhere](ch13_elsewhere) | tokio, axum, POE, Ranch, ThousandIsland |

// The targets of the links between chapters. In Markdown, the first definition of a link counts. So
// these definitions come before those of the chapters, which lead to files in the repository.

#[doc = "[next]: crate::guide::ch02_protocol"]
#[doc = "[chapter 2]: crate::guide::ch02_protocol"]
#[doc = "[chapter 7]: crate::guide::ch07_limits#setting-them"]
#[doc = include_str!("../docs/01-ten-lines.md")]
pub mod ch01_ten_lines {}

#[doc = "[next]: crate::guide::ch03_state"]
#[doc = "[chapter 12]: crate::guide::ch12_watching"]
#[doc = include_str!("../docs/02-protocol.md")]
pub mod ch02_protocol {}

#[doc = "[next]: crate::guide::ch04_push"]
#[doc = "[chapter 8]: crate::guide::ch08_tls"]
#[doc = include_str!("../docs/03-state.md")]
pub mod ch03_state {}

#[doc = "[next]: crate::guide::ch05_many"]
#[doc = "[chapter 9]: crate::guide::ch09_drain"]
#[doc = include_str!("../docs/04-push.md")]
pub mod ch04_push {}

#[doc = "[next]: crate::guide::ch06_layers"]
#[doc = include_str!("../docs/05-many.md")]
pub mod ch05_many {}

#[doc = "[next]: crate::guide::ch07_limits"]
#[doc = "[chapter 8]: crate::guide::ch08_tls"]
#[doc = include_str!("../docs/06-layers.md")]
pub mod ch06_layers {}

#[doc = "[next]: crate::guide::ch08_tls"]
#[doc = "[chapter 8]: crate::guide::ch08_tls"]
#[doc = include_str!("../docs/07-limits.md")]
pub mod ch07_limits {}

#[doc = "[next]: crate::guide::ch09_drain"]
#[doc = include_str!("../docs/08-tls.md")]
pub mod ch08_tls {}

#[doc = "[next]: crate::guide::ch10_http"]
#[doc = include_str!("../docs/09-drain.md")]
pub mod ch09_drain {}

#[doc = "[next]: crate::guide::ch11_testing"]
#[doc = include_str!("../docs/10-http.md")]
pub mod ch10_http {}

#[doc = "[next]: crate::guide::ch12_watching"]
#[doc = include_str!("../docs/11-testing.md")]
pub mod ch11_testing {}

#[doc = "[next]: crate::guide::ch13_elsewhere"]
#[doc = include_str!("../docs/12-watching.md")]
pub mod ch12_watching {}

#[doc = "[chapter 10]: crate::guide::ch10_http"]
#[doc = include_str!("../docs/13-elsewhere.md")]
pub mod ch13_elsewhere {}
