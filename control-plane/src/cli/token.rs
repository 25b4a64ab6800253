//! `weft token`: a join token for a workload that no Kubernetes vouches for.
//!
//! Why it needs the state folder and not the API: whoever may read the join key may say who is who. An API that
//! hands out tokens would need to know who asks, which is the question that a token answers.

use std::{
    path::PathBuf,
    process::ExitCode,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, anyhow, ensure};
use clap::Args;
use weft_core::identity::TrustDomain;

use super::output::{Format, Output, json, text};
use crate::{
    ca::{self, Claims, JoinKey},
    resources::values::GatewayDuration,
};

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  weft token --state-dir ./state --namespace shop --service-account web --uid vm-17 > token\n  WEFT_TOKEN_FILE=token weft-proxy"
)]
pub(super) struct TokenArgs {
    /// The controller's state folder
    #[arg(long, value_name = "FOLDER")]
    state_dir: PathBuf,
    /// The workload's namespace
    #[arg(long)]
    namespace: String,
    /// Its service account
    #[arg(long, value_name = "NAME")]
    service_account: String,
    /// Its pod's uid; any name that no other workload has
    #[arg(long)]
    uid: String,
    /// Its pod's name; the uid unless given
    #[arg(long)]
    pod: Option<String>,
    /// How long the token can be used
    #[arg(long, default_value = "24h", value_parser = validity)]
    valid_for: Duration,
    #[command(flatten)]
    format: Format,
}

pub(super) fn main(args: &TokenArgs) -> Result<ExitCode> {
    let state = &args.state_dir;
    ensure!(
        state.is_dir(),
        "{} is not a folder: name the --state-dir that weft-controller was started with",
        state.display()
    );
    let until = SystemTime::now() + args.valid_for;
    let pod = args.pod.as_deref().unwrap_or(&args.uid);
    let key = JoinKey::open(state).context("opening the join key (it belongs to the controller's user)")?;
    let claims = Claims::new(&args.namespace, &args.service_account, &args.uid, pod, until);
    let token = key.sign(&claims);
    // The controller would refuse it when it is used; better now.
    ca::workload_subject(&TrustDomain::new("cluster.local")?, &claims)
        .map_err(|error| anyhow!("namespace, service account and uid cannot be a workload: {error}"))?;
    match args.format.output {
        Output::Json => json(&serde_json::json!({ "token": token, "claims": claims }))?,
        Output::Text => text(&[token])?,
    }
    Ok(ExitCode::SUCCESS)
}

fn validity(text: &str) -> Result<Duration, String> {
    let GatewayDuration(validity) = text.parse().map_err(|_| "write a duration such as 24h".to_owned())?;
    let most = Duration::from_secs(10 * 365 * 86_400);
    if validity.is_zero() || validity > most {
        Err("write something from 1s to ten years".to_owned())
    } else {
        Ok(validity)
    }
}
