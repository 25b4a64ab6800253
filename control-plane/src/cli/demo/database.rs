//! A real MariaDB, as Debian ships it, in a pod of its own.

use std::{
    fs,
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nix::unistd::{Gid, Uid, User};

use super::{
    app::ITEMS,
    mesh,
    netns::{Pod, Process},
};

/// A data folder that is being made; that takes seconds, so it is started early.
pub(super) struct Preparing {
    process: Process,
    folder: PathBuf,
    owner: (Uid, Gid),
}

impl Preparing {
    /// Starts to make a data folder in `parent`.
    pub(super) fn start(parent: &Path) -> Result<Self> {
        let folder = parent.join("db");
        fs::create_dir_all(&folder)?;
        // The server refuses to run as root; Debian's package brings a user for it.
        let user = match User::from_name("mysql")? {
            Some(user) => user,
            None => User::from_name("nobody")?.context("there is neither a user mysql nor nobody")?,
        };
        let owner = (user.uid, user.gid);
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o700))?;
        nix::unistd::chown(&folder, Some(owner.0), Some(owner.1))
            .context("giving the database its folder")?;
        let log = fs::File::create(parent.join("log/db-init.log"))?;
        let mut command = Command::new("mariadb-install-db");
        command
            .args(["--no-defaults", "--auth-root-authentication-method=normal", "--skip-test-db"])
            .arg(format!("--datadir={}", folder.join("data").display()))
            // It makes temporary files and looks around in its folder.
            .current_dir(&folder)
            .env("HOME", &folder)
            .env("TMPDIR", &folder)
            .uid(owner.0.as_raw())
            .gid(owner.1.as_raw())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let process = Process::spawn(&mut command).context("mariadb-install-db")?;
        Ok(Self { process, folder, owner })
    }

    /// Waits for the folder and starts the server in a pod.
    pub(super) fn serve(mut self, pod: &Pod, log: &Path) -> Result<Process> {
        let init_log = log.with_file_name("db-init.log");
        let mut status = None;
        mesh::wait(Duration::from_secs(60), || {
            status = self.process.child().try_wait()?;
            Ok(status.is_some())
        })
        .context("mariadb-install-db")?;
        let well = status.is_some_and(|status| status.success());
        ensure!(well, "mariadb-install-db failed:\n{}", mesh::tail(&init_log));
        let init = self.folder.join("init.sql");
        fs::write(&init, init_sql())?;
        fs::set_permissions(&init, fs::Permissions::from_mode(0o644))?;
        let file = fs::File::create(log)?;
        let socket = self.folder.join("socket");
        let mut command = pod.command_as(self.owner.0.as_raw(), self.owner.1.as_raw(), "mariadbd");
        command
            .args(["--no-defaults", "--bind-address=0.0.0.0", "--port=3306", "--skip-name-resolve"])
            .args(["--innodb-buffer-pool-size=16M", "--innodb-log-file-size=4M", "--skip-log-bin"])
            // A shop that lives for a minute does not outlive a power cut.
            .args(["--innodb-flush-log-at-trx-commit=0", "--performance-schema=OFF", "--max-connections=200"])
            .arg(format!("--datadir={}", self.folder.join("data").display()))
            .arg(format!("--socket={}", socket.display()))
            .arg(format!("--pid-file={}", self.folder.join("pid").display()))
            .arg(format!("--init-file={}", init.display()))
            .current_dir(&self.folder)
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file);
        let mut server = Process::spawn(&mut command).context("mariadbd")?;
        // The socket appears when the server is up; a connection to the port would count as an aborted one.
        mesh::wait(Duration::from_secs(30), || {
            ensure!(server.running(), "it ended:\n{}", mesh::tail(log));
            Ok(std::os::unix::net::UnixStream::connect(&socket).is_ok())
        })
        .with_context(|| format!("MariaDB did not start:\n{}", mesh::tail(log)))?;
        Ok(server)
    }
}

fn init_sql() -> String {
    // One statement a line: that is how an init file is read.
    let mut sql = "CREATE DATABASE shop;\n\
                   CREATE USER 'app'@'%' IDENTIFIED BY '';\n\
                   GRANT ALL ON shop.* TO 'app'@'%';\n\
                   CREATE TABLE shop.items (id INT PRIMARY KEY, name VARCHAR(40) NOT NULL);\n\
                   CREATE TABLE shop.orders (id INT AUTO_INCREMENT PRIMARY KEY, item INT, cents INT, note VARCHAR(80), size INT);\n"
        .to_owned();
    for item in 1..=ITEMS {
        sql.push_str(&format!("INSERT INTO shop.items VALUES ({item}, 'item {item}');\n"));
    }
    sql
}
