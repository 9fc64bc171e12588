//! Before there are routes.

use super::*;
use crate::availability::Availability;
use crate::http::{Gate, testing};

#[tokio::test]
async fn until_there_are_routes_every_one_of_them_says_that_the_server_is_starting() {
    let availability = Availability::starting();
    let gate = Gate::new(availability.clone(), &Access::default());
    let client = testing::Client::of(gate.clone());
    availability.starting_with("the model is warming up");
    for path in ["/health", "/ping", "/"] {
        let health = client.get(path).await;
        health.assert_error(503, "healthcheck", "unhealthy");
        assert_eq!(health.json()["status"], "starting");
        assert_eq!(health.json()["reason"], "the model is warming up");
    }
    let refused =
        [("GET", "/info"), ("GET", "/metrics"), ("POST", "/"), ("POST", "/generate"), ("POST", "/nope")];
    for (method, path) in refused {
        let answer = client.ask(method, path, &[], "{}").await;
        answer.assert_error(503, "unavailable", "the server is starting");
        assert_eq!(answer.headers["retry-after"], "1");
        assert!(has_header(&answer, "access-control-allow-origin"));
    }
    let routes = Setup { availability: availability.clone(), ..Setup::default() };
    let (routes, _mail) = routes.start();
    gate.open(routes.into_routes());
    assert_eq!(client.get("/info").await.status, StatusCode::OK);
    assert_eq!(client.get("/health").await.json()["status"], "starting");
    availability.serving();
    assert_eq!(client.get("/health").await.status, StatusCode::OK);
}
