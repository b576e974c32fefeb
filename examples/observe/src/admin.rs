//! The pages for the operators of the server.

use std::convert::Infallible;

use metrics_exporter_prometheus::PrometheusHandle;
use tower::ServiceExt;
use tower_tcp::health::{Health, HealthChecks};
use tower_tcp::http::RequestBody;
use tower_tcp::http::hyper::header::{ALLOW, CONTENT_TYPE, ORIGIN, REFRESH};
use tower_tcp::http::hyper::{Method, Request, Response, StatusCode};

use crate::actions::Actions;
use crate::table;

const INDEX: &str = "\
GET  /live /ready               for load balancers and probes
GET  /status                    phase, connections, limit, bans
GET  /metrics                   for Prometheus
GET  /connections               also as /connections.json
GET  /bans                      the banned addresses, and for how long
POST /pause /suspend /resume    stop accepting; stop listening; do both again
POST /limit/N /limit/none       change the connection limit
POST /lame-duck /drain          not ready any more; then shut down
POST /connections/ID/close      close gracefully; /abort at once
POST /bans/IP/SECONDS           deny an address; /bans/IP/lift ends it
POST /reload                    read the --deny file again
POST /replace                   start the installed version, then drain
";

/// The media type that Prometheus expects.
/// (<https://prometheus.io/docs/instrumenting/exposition_formats/>)
const METRICS: &str = "text/plain; version=0.0.4";

#[derive(Clone)]
pub(crate) struct Admin {
    pub(crate) actions: Actions,
    pub(crate) checks: HealthChecks,
    pub(crate) metrics: PrometheusHandle,
}

impl Admin {
    pub(crate) async fn answer(
        self,
        request: Request<RequestBody>,
    ) -> Result<Response<String>, Infallible> {
        let path = request.uri().path().to_owned();
        let path: Vec<_> = path.split('/').skip(1).collect();
        if let ["live" | "ready"] = path[..] {
            return self.checks.oneshot(request).await;
        }
        let answer = Response::builder();
        let answer = match (request.method(), &path[..]) {
            (&Method::POST, action) => {
                let (status, said) = self.act(&request, action).await;
                answer.status(status).body(format!("{said}\n"))
            }
            // hyper sends no body in the answer to a HEAD request.
            (&Method::GET | &Method::HEAD, page) => match *page {
                [""] => answer.body(INDEX.to_owned()),
                ["status"] => answer.body(self.status()),
                ["metrics"] => {
                    self.actions.server.collect_metrics();
                    self.actions.admin.collect_metrics();
                    self.actions.agent.collect_metrics();
                    let answer = answer.header(CONTENT_TYPE, METRICS);
                    answer.body(self.metrics.render())
                }
                // A browser reloads this page every second.
                ["connections"] => answer
                    .header(REFRESH, 1)
                    .body(table::text(&self.actions.server)),
                ["connections.json"] => answer
                    .header(CONTENT_TYPE, "application/json")
                    .body(table::json(&self.actions.server)),
                ["bans"] => answer.body(self.bans()),
                _ => answer.status(StatusCode::NOT_FOUND).body(String::new()),
            },
            _ => answer
                .status(StatusCode::METHOD_NOT_ALLOWED)
                .header(ALLOW, "GET, HEAD, POST")
                .body("GET, HEAD or POST\n".to_owned()),
        };
        Ok(answer.expect("constants make good headers"))
    }

    /// Performs an action, unless the request may come from a web page in the operator's browser.
    /// Browsers send an `Origin` header with such requests, other programs do not.
    async fn act(&self, request: &Request<RequestBody>, action: &[&str]) -> (StatusCode, String) {
        if request.headers().contains_key(ORIGIN) {
            return (StatusCode::FORBIDDEN, "not from a browser".to_owned());
        }
        match self.actions.act(action).await {
            Ok(said) => (StatusCode::OK, said),
            Err(refusal) => refusal,
        }
    }

    fn bans(&self) -> String {
        let bans = self.actions.bans.list().into_iter();
        bans.map(|(address, rest)| format!("{address} {} s\n", rest.as_secs()))
            .collect()
    }

    fn status(&self) -> String {
        let health = Health::of(&self.actions.server);
        let bans = self.actions.bans.len();
        format!("{health}\n{bans} bans, process {}\n", std::process::id())
    }
}
