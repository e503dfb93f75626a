//! Which rpc a path is.

use axum::extract::Request;

/// An rpc of the server, as far as layers care.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rpc {
    /// `Service/Method`, or `http/` and a route, as labels and spans show it. One of a fixed set: strangers cannot make up
    /// labels.
    pub(crate) name: &'static str,
    pub(crate) class: Class,
}

/// What an rpc is for, which decides on the role that it needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// Scores, ranks or tokenizes.
    Score,
    /// Generates.
    Generate,
    /// Tells what is served.
    Read,
    /// Changes the server.
    Admin,
    /// Health and reflection: for load balancers and tools, which have no key.
    Infrastructure,
}

const REFLECTION: Rpc = Rpc { name: "reflection", class: Class::Infrastructure };

/// What is asked over plain HTTP: the routes of the gateway.
pub(crate) const HTTP: [(&str, Rpc); 10] = [
    ("/get_reward", Rpc { name: "http/get_reward", class: Class::Score }),
    ("/score", Rpc { name: "http/score", class: Class::Score }),
    ("/v1/score", Rpc { name: "http/score", class: Class::Score }),
    ("/classify", Rpc { name: "http/classify", class: Class::Score }),
    ("/pooling", Rpc { name: "http/pooling", class: Class::Score }),
    ("/rerank", Rpc { name: "http/rerank", class: Class::Score }),
    ("/v1/rerank", Rpc { name: "http/rerank", class: Class::Score }),
    ("/v2/rerank", Rpc { name: "http/rerank", class: Class::Score }),
    ("/v1/embeddings", Rpc { name: "http/embeddings", class: Class::Score }),
    ("/v1/models", Rpc { name: "http/models", class: Class::Read }),
];

const RPCS: [(&str, Rpc); 13] = [
    ("/plumb.v1.Preference/Score", Rpc { name: "Preference/Score", class: Class::Score }),
    ("/plumb.v1.Preference/ScoreStream", Rpc { name: "Preference/ScoreStream", class: Class::Score }),
    ("/plumb.v1.Preference/Rank", Rpc { name: "Preference/Rank", class: Class::Score }),
    ("/plumb.v1.Generation/Generate", Rpc { name: "Generation/Generate", class: Class::Generate }),
    ("/plumb.v1.Models/ListModels", Rpc { name: "Models/ListModels", class: Class::Read }),
    ("/plumb.v1.Models/GetModel", Rpc { name: "Models/GetModel", class: Class::Read }),
    ("/plumb.v1.Models/WatchModels", Rpc { name: "Models/WatchModels", class: Class::Read }),
    ("/plumb.v1.Models/LoadVersion", Rpc { name: "Models/LoadVersion", class: Class::Admin }),
    ("/plumb.v1.Models/UnloadVersion", Rpc { name: "Models/UnloadVersion", class: Class::Admin }),
    ("/plumb.v1.Models/SetLabel", Rpc { name: "Models/SetLabel", class: Class::Admin }),
    ("/plumb.v1.Models/SetTraffic", Rpc { name: "Models/SetTraffic", class: Class::Admin }),
    ("/plumb.v1.Tokens/Tokenize", Rpc { name: "Tokens/Tokenize", class: Class::Score }),
    ("/plumb.v1.Tokens/Render", Rpc { name: "Tokens/Render", class: Class::Score }),
];

impl Rpc {
    /// The rpc that a request calls. One that is not known needs the admin's role: what is added to the contract and
    /// forgotten here is closed, not open.
    pub(crate) fn of(request: &Request) -> Self {
        let path = request.uri().path();
        if path.starts_with("/grpc.health.v1.") {
            return Self { name: "health", class: Class::Infrastructure };
        }
        if path.starts_with("/grpc.reflection.") {
            return REFLECTION;
        }
        let known = RPCS.iter().chain(&HTTP).find(|(known, _)| *known == path);
        known.map_or(Self { name: "unknown", class: Class::Admin }, |(_, rpc)| *rpc)
    }

    /// In which protocol it is called, as traces name it.
    pub(crate) fn system(self) -> &'static str {
        if self.is_http() { "http" } else { "grpc" }
    }

    /// Whether it is a route of the gateway.
    pub(crate) fn is_http(self) -> bool {
        self.name.starts_with("http/")
    }

    /// Whether the caller may take as long as it likes between the messages of its request.
    pub(crate) fn streams_requests(self) -> bool {
        self.name == "Preference/ScoreStream" || self == REFLECTION
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rpc_of_the_contract_is_known() {
        use prost::Message as _;
        let files = prost_types::FileDescriptorSet::decode(plumb_proto::FILE_DESCRIPTOR_SET).unwrap();
        let services = files.file.iter().filter(|file| file.package() == "plumb.v1").flat_map(|file| &file.service);
        let mut paths: Vec<_> = services
            .flat_map(|service| {
                service.method.iter().map(|method| format!("/plumb.v1.{}/{}", service.name(), method.name()))
            })
            .collect();
        paths.sort();
        let mut known: Vec<_> = RPCS.iter().map(|(path, _)| (*path).to_owned()).collect();
        known.sort();
        assert_eq!(known, paths);
        for (path, rpc) in RPCS {
            assert_eq!(path, format!("/plumb.v1.{}", rpc.name));
        }
        let services = files.file.iter().filter(|file| file.package() == "plumb.v1").flat_map(|file| &file.service);
        for (service, method) in services.flat_map(|service| service.method.iter().map(move |m| (service, m))) {
            let path = format!("/plumb.v1.{}/{}", service.name(), method.name());
            let (_, rpc) = RPCS.iter().find(|(known, _)| *known == path).unwrap();
            assert_eq!(rpc.streams_requests(), method.client_streaming(), "{path}");
        }
    }

    #[test]
    fn health_and_reflection_are_infrastructure_and_strangers_are_admin() {
        let class = |path: &str| Rpc::of(&Request::builder().uri(path).body(axum::body::Body::empty()).unwrap()).class;
        assert_eq!(class("/grpc.health.v1.Health/Check"), Class::Infrastructure);
        assert_eq!(class("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"), Class::Infrastructure);
        assert_eq!(class("/plumb.v1.Models/LoadVersion"), Class::Admin);
        assert_eq!((class("/get_reward"), class("/v1/models")), (Class::Score, Class::Read));
        assert_eq!(class("/plumb.v1.Models/DropAllTables"), Class::Admin);
    }
}
