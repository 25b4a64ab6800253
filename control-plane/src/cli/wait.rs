//! `weft wait`: returns when a change is live, for scripts that must know.
//!
//! Why it exists: without it a pipeline sleeps and hopes. It waits for the object *as it stands in the source
//! now*: correct, and live in every sidecar that it concerns.

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Result, bail, ensure};
use clap::Args;

use super::{
    client::{Api, Asking},
    output::{Output, json, text},
    status::{Wanted, problem_line},
};
use crate::{
    api::types::{ObjectStatus, ReplicaStatus, Status},
    resources::values::GatewayDuration,
};

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  weft wait HTTPRoute/shop/web --applied\n  weft wait TrafficPolicy/shop/api --applied --timeout 1m --after 3f2a\n\nExit code: 0 when it is live everywhere, 1 when it is wrong or not live in time."
)]
pub(super) struct WaitArgs {
    /// What: KIND/NAMESPACE/NAME
    #[arg(value_name = "KIND/NAMESPACE/NAME")]
    object: String,
    /// Until it is live in every sidecar that it concerns
    #[arg(long, required = true)]
    applied: bool,
    /// For so long at most
    #[arg(long, default_value = "30s", value_parser = patience)]
    timeout: Duration,
    /// Not before its version differs from this one, which `weft status -o json` showed before the change
    #[arg(long, value_name = "VERSION")]
    after: Option<String>,
    #[command(flatten)]
    asking: Asking,
}

pub(super) async fn main(args: &WaitArgs) -> Result<ExitCode> {
    ensure!(
        args.object.split('/').count() == 3 || args.object.to_ascii_lowercase().starts_with("meshconfig/"),
        "{:?} is not an object: write KIND/NAMESPACE/NAME, for instance HTTPRoute/shop/web",
        args.object
    );
    let api = Api::find(&args.asking).await?;
    let wanted = Wanted::parse(&args.object);
    let started = Instant::now();
    loop {
        // A controller that is just being restarted is part of what is waited for.
        let status: Result<Status> = api.get("/api/v1/status").await;
        let late = started.elapsed() >= args.timeout;
        match status {
            Ok(status) => {
                let found = status.objects.iter().find(|o| wanted.is(&o.kind, &o.namespace, &o.name));
                let done = |object: &&ObjectStatus| done(object, &status.replicas, args.after.as_deref());
                if let Some(object) = found.filter(done) {
                    let problem = status.problems.iter().find(|p| p.object == object.key());
                    if let Some(problem) = problem {
                        bail!("its newest text is not in force: {}", problem_line(problem));
                    }
                    return said(args, object, started.elapsed());
                }
                if late {
                    bail!("{}", why_not(args, found, &status.replicas));
                }
            }
            Err(error) if late => return Err(error),
            Err(_) => {}
        }
        tokio::time::sleep(EVERY).await;
    }
}

/// What a controller does not say of its sidecars is not known: nobody may call that live.
fn done(object: &ObjectStatus, replicas: &[ReplicaStatus], after: Option<&str>) -> bool {
    object.applied >= object.of
        && replicas.iter().all(|replica| replica.answered)
        && after.is_none_or(|before| before != object.version)
}

fn said(args: &WaitArgs, object: &ObjectStatus, waited: Duration) -> Result<ExitCode> {
    let wrong = object.conditions.iter().find(|c| c.status == (c.kind == "PartiallyInvalid"));
    match args.asking.format.output {
        Output::Json => json(object)?,
        Output::Text => text(&[format!(
            "{} is live in {}/{} sidecars (version {}, waited {:.1}s)",
            object.key(),
            object.applied,
            object.of,
            object.version,
            waited.as_secs_f64()
        )])?,
    }
    match wrong {
        None => Ok(ExitCode::SUCCESS),
        Some(wrong) => bail!("but it is not right: {} {}: {}", wrong.kind, wrong.reason, wrong.message),
    }
}

fn why_not(args: &WaitArgs, found: Option<&ObjectStatus>, replicas: &[ReplicaStatus]) -> String {
    let Some(object) = found else {
        return format!(
            "there is no {} after {:?}; `weft status --all` lists what there is",
            args.object, args.timeout
        );
    };
    if args.after.as_deref() == Some(&*object.version) {
        return format!("{} has not changed: still version {}", args.object, object.version);
    }
    let laggards = object.laggards.iter().take(5).map(|laggard| match laggard.reason.as_str() {
        "" => laggard.pod.clone(),
        reason => format!("{} ({reason})", laggard.pod),
    });
    let silent = replicas.iter().filter(|replica| !replica.answered);
    let silent = silent.map(|replica| format!("the controller {} (it does not answer)", replica.name));
    let missing: Vec<_> = laggards.chain(silent).collect();
    format!(
        "{} is live in {}/{} sidecars after {:?}; missing: {}",
        args.object,
        object.applied,
        object.of,
        args.timeout,
        missing.join(", ")
    )
}

fn patience(text: &str) -> Result<Duration, String> {
    let GatewayDuration(patience) =
        text.parse().map_err(|_| "write a duration such as 30s or 5m".to_owned())?;
    Ok(patience)
}

const EVERY: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_does_not_answer_may_have_sidecars_that_lack_it() {
        let object = ObjectStatus { applied: 2, of: 2, version: "b".to_owned(), ..ObjectStatus::default() };
        let replica = |answered| ReplicaStatus { name: "two".to_owned(), answered };
        assert!(done(&object, &[replica(true)], None) && done(&object, &[], Some("a")));
        assert!(!done(&object, &[replica(true), replica(false)], None));
        assert!(!done(&object, &[], Some("b")));
    }
}
