//! Flags → what the controller uses. Two stages: what the user typed, then what was checked, with every
//! error reported at once.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use clap::{Args, Parser, ValueEnum};
use weft_core::{identity::TrustDomain, policy::ServiceName, ports};

use crate::{
    injector::Values,
    resources::{CONTROL_NAMESPACE, values::GatewayDuration},
    webhook,
};

/// Weft's controller: reads the mesh's objects, tells every sidecar its policy, issues its certificate.
#[derive(Clone, Debug, Parser)]
#[command(
    version,
    after_help = "Example, without Kubernetes:\n  \
        weft-controller --source dir ./mesh --state-dir ./state\n  \
        weft token --state-dir ./state --namespace shop --service-account cart --uid cart-1\n\n\
        Sidecars trust STATE-DIR/trust-anchors.pem and bring such a token.\n\
        `weft status` shows what was read, what is wrong with it, and where it is live."
)]
pub struct Cli {
    /// Flags of the server.
    #[command(flatten)]
    pub serve: ServeArgs,
}

/// Flags of the server.
#[derive(Clone, Debug, Args)]
pub struct ServeArgs {
    /// Where the mesh's objects are: `kubernetes`, or `dir PATH`, a folder of YAML and JSON, watched.
    #[arg(long, num_args = 1..=2, value_names = ["KIND", "PATH"], env = "WEFT_SOURCE", value_delimiter = ':')]
    pub source: Vec<String>,
    /// Kubernetes: the Secret of the issuer, in the namespace weft; made if missing, or yours in the layout of kubernetes.io/tls
    /// (tls.crt, tls.key, and the roots in ca.crt).
    #[arg(long, value_name = "NAME", env = "WEFT_ISSUER_SECRET", default_value = "weft-issuer")]
    pub issuer_secret: String,
    /// Kubernetes: the ClusterRole that owns what the controller makes, so that it goes with the installation.
    #[arg(long, value_name = "NAME", env = "WEFT_CLUSTER_ROLE")]
    pub cluster_role: Option<String>,
    /// Kubernetes: this replica's pod.
    #[arg(long, value_name = "NAME", env = "WEFT_POD_NAME", default_value = "")]
    pub pod_name: String,
    /// Kubernetes: port of the admission webhooks, which the API server calls.
    #[arg(long, value_name = "PORT", env = "WEFT_WEBHOOK_PORT", default_value_t = webhook::PORT)]
    pub webhook_port: u16,
    /// Kubernetes: what sidecars are like, as `weft inject --values` takes it; the defaults unless given.
    #[arg(long, value_name = "FILE", env = "WEFT_WEBHOOK_VALUES")]
    pub webhook_values: Option<PathBuf>,
    /// Address of readiness and metrics alone, for those who are not on this machine.
    #[arg(long, value_name = "ADDRESS", env = "WEFT_PROBE_LISTEN")]
    pub probe_listen: Option<SocketAddr>,
    /// With `dir`: roots, join key and trust anchors; made if missing.
    #[arg(long, value_name = "PATH", env = "WEFT_STATE_DIR", default_value = "./state")]
    pub state_dir: PathBuf,
    /// Address of the ports that sidecars connect to.
    #[arg(long, value_name = "ADDRESS", env = "WEFT_LISTEN", default_value_t = IpAddr::V4(Ipv4Addr::UNSPECIFIED))]
    pub listen: IpAddr,
    /// Port of policy and telemetry (mTLS).
    #[arg(long, value_name = "PORT", env = "WEFT_DISCOVERY_PORT", default_value_t = ports::DISCOVERY)]
    pub discovery_port: u16,
    /// Port of certificates (TLS and a token).
    #[arg(long, value_name = "PORT", env = "WEFT_IDENTITY_PORT", default_value_t = ports::IDENTITY)]
    pub identity_port: u16,
    /// Address of the JSON API, metrics and readiness. It shows the whole mesh: keep it on loopback.
    #[arg(long, value_name = "ADDRESS", env = "WEFT_API_LISTEN",
        default_value_t = SocketAddr::from((Ipv4Addr::LOCALHOST, ports::API)))]
    pub api_listen: SocketAddr,
    /// The mesh's trust domain.
    #[arg(long, value_name = "NAME", env = "WEFT_TRUST_DOMAIN", default_value = "cluster.local")]
    pub trust_domain: String,
    /// How long workload certificates live: 10s to 24h.
    #[arg(long, value_name = "DURATION", env = "WEFT_CERTIFICATE_LIFETIME", default_value = "24h")]
    pub certificate_lifetime: String,
    /// How long a sidecar's connection lives before it is asked to come back, ± 20 %.
    #[arg(long, value_name = "DURATION", env = "WEFT_MAX_CONNECTION_AGE", default_value = "30m")]
    pub max_connection_age: String,
    /// What is logged, such as `info` or `weft_control_plane=debug`.
    #[arg(long, value_name = "FILTER", env = "WEFT_LOG", default_value = "info")]
    pub log: String,
    /// How it is logged.
    #[arg(long, value_enum, env = "WEFT_LOG_FORMAT", default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
}

/// How logs are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// For machines.
    Json,
}

/// What the controller uses.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where objects are.
    pub source: Source,
    /// The state folder of a controller without a cluster.
    pub state_dir: PathBuf,
    /// Policy and telemetry. Port 0 takes a free one.
    pub discovery: SocketAddr,
    /// Certificates.
    pub identity: SocketAddr,
    /// JSON API.
    pub api: SocketAddr,
    /// Readiness and metrics alone.
    pub probes: Option<SocketAddr>,
    /// The mesh's trust domain.
    pub trust_domain: TrustDomain,
    /// Of workload certificates.
    pub certificate_lifetime: Duration,
    /// Of sidecars' connections.
    pub max_connection_age: Duration,
}

/// Where objects are.
#[derive(Clone, Debug, PartialEq)]
pub enum Source {
    /// In a folder.
    Folder(PathBuf),
    /// In a cluster.
    Kubernetes(Box<Cluster>),
}

/// What the controller is to its cluster.
#[derive(Clone, Debug, PartialEq)]
pub struct Cluster {
    /// The API server, if it is not the one of the service account or the kubeconfig.
    pub server: Option<http::Uri>,
    /// The issuer's Secret, in the controller's own namespace.
    pub issuer_secret: String,
    /// What owns what it makes.
    pub cluster_role: Option<String>,
    /// This replica.
    pub pod: String,
    /// Where the API server asks for admission. Port 0 takes a free one.
    pub webhook: SocketAddr,
    /// What sidecars are like.
    pub values: Arc<Values>,
}

impl Cluster {
    /// The Service that sidecars come by; behind it are all controllers.
    pub fn service(&self) -> ServiceName {
        let (namespace, name) = (CONTROL_NAMESPACE.into(), "weft-controller".into());
        ServiceName { namespace, name, port: ports::DISCOVERY }
    }
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Folder(folder) => write!(f, "dir {}", folder.display()),
            Self::Kubernetes(_) => f.write_str("kubernetes"),
        }
    }
}

/// Everything that is wrong with the flags.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", .0.join("\n"))]
pub struct ConfigErrors(pub Vec<String>);

impl Config {
    /// A controller of `source` and `state_dir` on free loopback ports.
    ///
    /// # Errors
    /// None today; the trust domain is a constant.
    pub fn loopback(source: PathBuf, state_dir: PathBuf) -> Result<Self, ConfigErrors> {
        let free = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let trust_domain =
            TrustDomain::new("cluster.local").map_err(|e| ConfigErrors(vec![e.to_string()]))?;
        Ok(Self {
            source: Source::Folder(source),
            state_dir,
            discovery: free,
            identity: free,
            api: free,
            probes: None,
            trust_domain,
            certificate_lifetime: MAX_LIFETIME,
            max_connection_age: Duration::from_secs(30 * 60),
        })
    }

    /// Checks the flags.
    ///
    /// # Errors
    /// Everything that is wrong with them.
    pub fn new(args: &ServeArgs) -> Result<Self, ConfigErrors> {
        let mut errors = Vec::new();
        let source = match args.source.as_slice() {
            [kind] if kind == "kubernetes" => Source::Kubernetes(Box::new(Cluster {
                server: None,
                issuer_secret: args.issuer_secret.clone(),
                cluster_role: args.cluster_role.clone().filter(|name| !name.is_empty()),
                pod: args.pod_name.clone(),
                webhook: (args.listen, args.webhook_port).into(),
                values: match args
                    .webhook_values
                    .as_deref()
                    .map_or_else(|| Ok(Values::default()), Values::read)
                {
                    Ok(values) => Arc::new(values),
                    Err(error) => {
                        errors.push(format!("--webhook-values: {error:#}"));
                        Arc::default()
                    }
                },
            })),
            [kind, path] if kind == "dir" => {
                let path = PathBuf::from(path);
                if !path.is_dir() {
                    errors.push(format!("--source dir {}: there is no such folder", path.display()));
                }
                Source::Folder(path)
            }
            [] => {
                errors
                    .push("--source is missing: write --source kubernetes, or --source dir PATH".to_owned());
                Source::Folder(PathBuf::new())
            }
            other => {
                errors.push(format!("--source {}: write `kubernetes` or `dir PATH`", other.join(" ")));
                Source::Folder(PathBuf::new())
            }
        };
        let trust_domain = TrustDomain::new(&args.trust_domain);
        if let Err(error) = &trust_domain {
            errors.push(format!("--trust-domain: {error}"));
        }
        let mut duration = |flag: &str, text: &str, range: std::ops::RangeInclusive<Duration>| {
            let parsed = text.parse::<GatewayDuration>().map(|d| d.0).unwrap_or_default();
            if !range.contains(&parsed) {
                let (least, most) = (GatewayDuration(*range.start()), GatewayDuration(*range.end()));
                errors.push(format!("{flag} {text}: write a duration from {least} to {most}"));
            }
            parsed
        };
        let certificate_lifetime =
            duration("--certificate-lifetime", &args.certificate_lifetime, MIN_LIFETIME..=MAX_LIFETIME);
        let max_connection_age = duration(
            "--max-connection-age",
            &args.max_connection_age,
            Duration::from_secs(1)..=Duration::from_secs(24 * 3_600),
        );
        let mut listening = [args.discovery_port, args.identity_port, args.api_listen.port()];
        listening.sort_unstable();
        if listening.windows(2).any(|pair| pair[0] == pair[1] && pair[0] != 0) {
            errors.push("--discovery-port, --identity-port and --api-listen must differ".to_owned());
        }
        match trust_domain {
            Ok(trust_domain) if errors.is_empty() => Ok(Self {
                source,
                state_dir: args.state_dir.clone(),
                discovery: (args.listen, args.discovery_port).into(),
                identity: (args.listen, args.identity_port).into(),
                api: args.api_listen,
                probes: args.probe_listen,
                trust_domain,
                certificate_lifetime,
                max_connection_age,
            }),
            _ => Err(ConfigErrors(errors)),
        }
    }
}

const MIN_LIFETIME: Duration = Duration::from_secs(10);
const MAX_LIFETIME: Duration = Duration::from_secs(24 * 3_600);

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    fn parse(line: &str) -> Cli {
        Cli::try_parse_from(line.split(' ')).unwrap()
    }

    #[test]
    fn flags_become_the_config_that_they_say() {
        Cli::command().debug_assert();
        let cli = parse(
            "weft-controller --source dir /tmp --state-dir /s --listen 127.0.0.1 --certificate-lifetime 1m30s",
        );
        let config = Config::new(&cli.serve).unwrap();
        assert_eq!(config.discovery, "127.0.0.1:14010".parse().unwrap());
        assert_eq!(config.api, "127.0.0.1:14080".parse().unwrap());
        assert_eq!(config.certificate_lifetime, Duration::from_secs(90));
        let cli = parse("weft-controller --source kubernetes --issuer-secret mine --probe-listen [::]:14081");
        let config = Config::new(&cli.serve).unwrap();
        let Source::Kubernetes(cluster) = &config.source else { panic!("{:?}", config.source) };
        assert_eq!(cluster.issuer_secret, "mine");
        assert_eq!(config.probes, Some("[::]:14081".parse().unwrap()));
    }

    #[test]
    fn everything_wrong_is_said_at_once() {
        let cli = parse(
            "weft-controller --source etcd x --trust-domain UPPER --certificate-lifetime 48h --identity-port 14010",
        );
        let ConfigErrors(errors) = Config::new(&cli.serve).unwrap_err();
        assert_eq!(errors.len(), 4, "{errors:?}");
        let cli = parse("weft-controller --source dir /does/not/exist");
        assert!(Config::new(&cli.serve).unwrap_err().to_string().contains("no such folder"));
    }
}
