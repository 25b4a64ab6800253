//! What crosses the network between pods: nothing that an app said is readable there.

use std::process::Stdio;
use std::time::Duration;

use weft_control_plane::cli::demo::{mesh::wait, netns::Process};
use weft_harness::apps::{curl, output, service, start, testapp};

use crate::{ECHO, pair};

#[test]
fn a_planted_token_is_found_nowhere_between_the_pods() {
    const TOKEN: &str = "planted-5e1f-token";
    let Some(pair) = pair("planted_token", &[]) else { return };
    let server = &pair.server.sidecar.pod;
    let _tcp = start(&mut testapp(&pair.mesh, server, &["tcp", "--port", "9100"]), server, 9100).unwrap();
    service(&pair.mesh, "shop", "echo", "10.96.0.1", &[("web", 80, 8080), ("raw", 91, 9100)]).unwrap();
    let capture = pair.mesh.dir().join("capture.pcap");
    let mut command = pair.mesh.world.bridge().command("tcpdump");
    command
        .args(["-i", "any", "-U", "--immediate-mode", "-Z", "root", "-s", "0", "-w"])
        .arg(&capture)
        .stdin(Stdio::null())
        .stderr(Stdio::null());
    let tcpdump = Process::spawn(&mut command).unwrap();
    wait(Duration::from_secs(10), || Ok(capture.exists())).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    let pod = &pair.client.pod;
    let header = format!("x-secret: {TOKEN}");
    let echoed = curl(pod, &["-H", &header, "-d", TOKEN, &format!("{ECHO}/echo?{TOKEN}")]).unwrap();
    assert_eq!(echoed, TOKEN);
    let echoed = curl(pod, &["--http2-prior-knowledge", "-H", &header, "-d", TOKEN, &format!("{ECHO}/echo")]);
    assert_eq!(echoed.unwrap(), TOKEN);
    let statement = format!("printf \"SELECT '{TOKEN}'\" | nc -N -w 5 10.96.0.1 91");
    assert!(output(pair.client.app("bash").args(["-c", &statement])).unwrap().contains(TOKEN));
    std::thread::sleep(Duration::from_millis(500));
    tcpdump.terminate(Duration::from_secs(5)).unwrap();
    let bytes = std::fs::read(&capture).unwrap();
    let found = bytes.windows(TOKEN.len()).filter(|window| *window == TOKEN.as_bytes()).count();
    println!("figure: {} bytes captured between the pods; the token was found {found} times", bytes.len());
    assert!(bytes.len() > 10_000, "the capture saw the traffic: {} bytes", bytes.len());
    assert_eq!(found, 0);
    // Nor in what the programs say about themselves.
    for name in ["controller", "client", "echo-1"] {
        let log = std::fs::read_to_string(pair.mesh.log(name)).unwrap();
        assert!(!log.contains(TOKEN), "{name}'s log: {log}");
    }
}
