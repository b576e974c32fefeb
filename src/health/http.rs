use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_LENGTH, CONTENT_TYPE, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use tower_service::Service;

use super::{Health, is_live};
use crate::handle::Handle;

/// Answers HTTP health checks: `GET` and `HEAD` of `/ready` and `/live`.
///
/// | path | `200` | `503` |
/// | --- | --- | --- |
/// | `/ready` | the server is [ready](super::Readiness::Ready) | it is at its limit, paused, suspended, in its lame-duck phase, draining or ended |
/// | `/live` | the accept loop runs ([`is_live`]) | the accept loop is blocked or has not started yet, or the server has ended |
///
/// Other methods get `405`, and other paths `404`.
///
/// The body of a `200` or `503` is one line, the `Display` output of [`Health`], such as
/// `lame_duck: phase lame_duck, 12 connections, limit 10000 with 12 in use`.
///
/// `HealthChecks` is a service of HTTP requests. Serve it with [`Http`](crate::http::Http) on an
/// admin listener, or add it to a router: in axum, `.route_service("/ready", checks)` or
/// `.nest_service("/health", checks)`.
///
/// ```no_run
/// use tower_tcp::{Error, Handle, Server, health::HealthChecks, http::Http};
///
/// /// Answers until the server has ended, even while it drains.
/// async fn admin(server: Handle) -> Result<(), Error> {
///     let admin = Server::bind("0.0.0.0:7001").await?;
///     let checks = Http::new(HealthChecks::new(server.clone()));
///     let ended = async move { drop(server.closed().await) };
///     admin.serve(checks).with_graceful_shutdown(ended).await?;
///     Ok(())
/// }
/// # let _ = admin;
/// ```
#[derive(Clone, Debug)]
pub struct HealthChecks {
    handle: Handle,
}

impl HealthChecks {
    /// Creates the service for the server of this handle.
    pub fn new(handle: Handle) -> Self {
        Self { handle }
    }
}

impl<B> Service<Request<B>> for HealthChecks {
    type Response = Response<String>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<String>, Infallible>> + Send>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let handle = self.handle.clone();
        let check = match request.uri().path() {
            "/ready" => Some(Check::Ready),
            "/live" => Some(Check::Live),
            _ => None,
        };
        let method = request.method().clone();
        Box::pin(async move {
            let Some(check) = check else {
                return Ok(answer(
                    StatusCode::NOT_FOUND,
                    &method,
                    "see /ready and /live",
                ));
            };
            if method != Method::GET && method != Method::HEAD {
                let mut refusal = answer(StatusCode::METHOD_NOT_ALLOWED, &method, "GET or HEAD");
                let allowed = HeaderValue::from_static("GET, HEAD");
                refusal.headers_mut().insert(ALLOW, allowed);
                return Ok(refusal);
            }
            let (is_good, health) = match check {
                Check::Live => (is_live(&handle).await, Health::of(&handle)),
                Check::Ready => {
                    let health = Health::of(&handle);
                    (health.is_ready(), health)
                }
            };
            let status = if is_good {
                StatusCode::OK
            } else {
                StatusCode::SERVICE_UNAVAILABLE
            };
            Ok(answer(status, &method, &health.to_string()))
        })
    }
}

#[derive(Clone, Copy)]
enum Check {
    Ready,
    Live,
}

fn answer(status: StatusCode, method: &Method, line: &str) -> Response<String> {
    let body = format!("{line}\n");
    let length = HeaderValue::from(body.len());
    let is_head = method == Method::HEAD;
    let mut answer = Response::new(if is_head { String::new() } else { body });
    *answer.status_mut() = status;
    let headers = answer.headers_mut();
    headers.insert(CONTENT_LENGTH, length);
    headers.insert(
        CONTENT_TYPE,
        HeaderValue::from_static("text/plain; charset=utf-8"),
    );
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    answer
}
