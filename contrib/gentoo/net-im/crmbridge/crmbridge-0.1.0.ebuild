# Never run on Gentoo: see README.md; docs/operate.md says where the distfile comes from. All its packages are in there.
EAPI=8

PYTHON_COMPAT=( python3_{11..14} )
inherit python-single-r1

DESCRIPTION="Carries Instagram direct messages to a shop's own CRM and the replies back"
SRC_URI="
	amd64? ( ${P}-x86_64.sh )
	arm64? ( ${P}-aarch64.sh )
"
S=${WORKDIR}
LICENSE="MIT"
SLOT="0"
KEYWORDS="~amd64 ~arm64"
REQUIRED_USE=${PYTHON_REQUIRED_USE}
RESTRICT="bindist fetch mirror strip test"
RDEPEND="
	${PYTHON_DEPS}
	acct-group/crmbridge
	acct-user/crmbridge
	sys-apps/openrc
"
BDEPEND="
	${PYTHON_DEPS}
	$(python_gen_cond_dep 'dev-python/pip[${PYTHON_USEDEP}]')
"
QA_PREBUILT="opt/crmbridge/*"

pkg_nofetch() {
	local arch=${A#"${P}-"}
	einfo "In a checkout, on any machine:  ./install.sh bundle --for ${arch%.sh} ${A}"
	einfo "Then put that file into your distfiles folder."
}

src_unpack() {
	tail -n "+$(awk '/^# the tar file begins/ { print NR + 1; exit }' "${DISTDIR}/${A}")" "${DISTDIR}/${A}" | tar -xm || die
}

src_install() {
	local home=/opt/crmbridge/${PV}
	"${EPYTHON}" -m pip install --no-index --find-links wheels --no-deps --no-compile --require-hashes \
		--target "${ED}${home}/lib" -r requirements.txt || die
	insinto "${home}"
	doins -r crmbridge static api-spec.yaml crmbridge.ini requirements.txt README.md docs LICENSE
	exeinto "${home}/bin"
	newexe - crmbridge <<-END
		#!/bin/sh
		export CRMBRIDGE_CONFIG="\${CRMBRIDGE_CONFIG:-/etc/crmbridge/crmbridge.ini}" PYTHONPATH=${home}:${home}/lib
		exec /usr/bin/${EPYTHON} -P -m crmbridge "\$@"
	END
	dosym "${PV}" /opt/crmbridge/current
	dosym ../../opt/crmbridge/current/bin/crmbridge /usr/bin/crmbridge

	newinitd openrc/crmbridge crmbridge
	newconfd openrc/crmbridge.confd crmbridge
	insinto /etc/logrotate.d
	newins openrc/crmbridge.logrotate crmbridge
	exeinto /etc/cron.daily
	newexe openrc/crmbridge.cron crmbridge

	sed -e "s|^path = .*|path = /var/lib/crmbridge/bridge.db|" -e "s|^queue_path = .*|queue_path = /var/lib/crmbridge/queue.db|" \
		-e "s|^key_file = .*|key_file = /etc/crmbridge/crmbridge.key|" crmbridge.ini >service.ini || die
	insinto /etc/crmbridge
	newins service.ini crmbridge.ini
	fowners -R root:crmbridge /etc/crmbridge
	fperms 0750 /etc/crmbridge
	fperms 0640 /etc/crmbridge/crmbridge.ini
	keepdir /var/lib/crmbridge/backups /var/log/crmbridge
	fowners -R crmbridge:crmbridge /var/lib/crmbridge /var/log/crmbridge
	fperms 0750 /var/lib/crmbridge /var/log/crmbridge
	fperms 0700 /var/lib/crmbridge/backups
}

pkg_postinst() {
	elog "Type:  crmbridge init && rc-update add crmbridge default && rc-service crmbridge start"
	elog "After an upgrade:  rc-service crmbridge stop && crmbridge migrate && rc-service crmbridge start"
}
